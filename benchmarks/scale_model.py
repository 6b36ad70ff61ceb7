"""Time and memory of a training step as sums of physical quantities: what scale.py fits, checks and extends.

A step is so many FLOPs of products and of attention, bytes that element-wise kernels move, bytes on the wire,
collectives, hooks and launches of the host (`Work`). A `Machine` turns them into seconds:

    compute = product FLOPs / rate + attention FLOPs / rate + bytes moved / bandwidth
    delays  = bytes on the wire / rate + collectives * time of one           by how much transfers delay the products
    alone   = bytes on the wire / the slowest link's rate + collectives * latency of a ring
    device  = compute + delays                   on one node
              max(compute + delays, alone)       on several, where all that the network takes longer is hidden
              compute + max(delays, alone)       on several, where nothing of it is
    host    = (hooks of ZeRO-3 + leaf modules * hooks of one) * time of one + launches * time of one
    step    = wait + max(device, host) of the forward + max(device, host) of the rest up to the optimizer + optimizer

Where the host is behind, the device waits, and does not make up for that later: so forward and backward each have
their slower side. ``wait`` is time in which no kernel can begin: the host's way to the first product of a step, and to
the optimizer, before which it looks at the gradients' norm.

The head in modes "stream" and "stationary" is `ds_fused.engine.zero3.figures`, by which mode "auto" chooses. It may
choose "gather" too, of which nothing is predicted.

Sizes: T tokens of a rank in a micro batch, W ranks. Bytes are of bf16 where nothing else is said.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ds_fused.engine.zero3.figures import Figures, HeadCosts, Rates, chosen, of_gather, sharded
from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.sizes import BUCKET, LIVE, PREFETCH, REUSE, sizes_of

MIB = 2**20
GPUS_OF_NODE = 8
# bytes a second that a GPU of this kind can take in over NVLink
NVLINK = 450e9
# seconds of a hop of a ring within a node and between two, as NCCL's own model has them for protocol LL128 (tuning.cc)
HOP, NETWORK_HOP = 1.9e-6, 4.0e-6
# of an optimizer's step per parameter: the gradient widened, read and its norm taken (12 B), the weight laid back (4 B)
OPTIMIZER_BYTES = 16
# and seconds of PyTorch's fused AdamW: 40.2 ms for 2.27e9 on an H100, in all ways of results/h100x2/end_to_end. Its
# 28 B would take half of that, so it is no matter of the memory's rate
ADAM = 17.7e-12
# the defaults of "fused_linear_cross_entropy"
CHUNK_MB, KEEP_MB, SLAB_MB = 512, 2048, 132
# of the memory, what "recompute": "fit" plans with
KEPT_SHARE = 0.9
# elements: DeepSpeed's sub_group_size, which the optimizer updates together
GROUP = 1e9
# seconds of the host for one launch of a kernel under autograd: assumed, since no measured point is bound by them
LAUNCH = 20e-6
# of them what a further tile of an MLP costs the host in a backward, where autograd runs once more: 3.3 ms, by the
# steps at 1 x 8192 of results/h100x4 and h200x4, those with whole MLPs beside them
TILE_LAUNCHES = 165
# what a module without weights takes of ZeRO-3's hooks, over one with some: on a CPU, of 64 modules on one rank, 0.49
# in a forward and 0.39 in a step
EMPTY = 0.45


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    q: int  # columns of the queries: heads times their width
    kv: int
    vocab: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Elements of a layer's products."""
        return sum(self.weights)

    @property
    def weights(self) -> tuple[int, ...]:
        """Elements of each of them."""
        inner = self.hidden * self.intermediate
        q, kv = self.hidden * self.q, self.hidden * self.kv
        return q, kv, kv, q, inner, inner, inner

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def elements(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.head


LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 14336, 4096, 1024, 128256)
LLAMA_70B = Shape("Llama-3-70B", 80, 8192, 28672, 8192, 1024, 128256)


@dataclass(frozen=True)
class Work:
    gemm: float = 0.0  # FLOPs
    attention: float = 0.0  # FLOPs of causal attention
    memory: float = 0.0  # bytes that kernels other than products read and write
    wire: float = 0.0  # bytes that a rank takes in
    calls: float = 0.0  # collectives
    hooks: float = 0.0  # of ZeRO-3, one for each module and pass
    leaves: float = 0.0  # decoder layers that are gathered as one, in each pass
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, vars(self).values(), vars(other).values()))

    def times(self, n: float) -> Work:
        return Work(*(n * value for value in vars(self).values()))


@dataclass(frozen=True)
class Machine:
    """Rates in SI units; those that are fitted come from scale_fit.py."""

    gemm: float
    attention: float
    memory: float
    delay: float  # bytes over NVLink for each second by which the products are later
    call: float  # seconds of a collective beside its bytes and hops
    hook: float  # seconds of the host
    leaf: float  # hooks that take as long as a leaf module's one does
    wait: float = 0.0  # seconds of a step in which the device can do nothing
    room: float = 139 * 2**30  # bytes of memory that a job can have
    network: float = 50e9  # bytes a second of each GPU's own network card

    def wire(self, ranks: int) -> float:
        """Bytes a second that a rank of a ring over all ranks takes in.

        On several nodes each one takes in what the others have, through all its cards at once.
        """
        nodes = -(-ranks // GPUS_OF_NODE)
        if nodes == 1:
            return self.delay
        share = (ranks - 1) / ranks / ((nodes - 1) / nodes)
        return min(NVLINK, GPUS_OF_NODE * self.network * share)

    def latency(self, ranks: int) -> float:
        nodes = -(-ranks // GPUS_OF_NODE)
        return self.call + (ranks - nodes) * HOP + (nodes - 1) * NETWORK_HOP

    def rates(self, ranks: int) -> Rates:
        """As mode "auto" measures them."""
        return Rates(self.gemm, self.memory, self.wire(ranks), self.latency(ranks))

    def compute(self, work: Work) -> float:
        return work.gemm / self.gemm + work.attention / self.attention + work.memory / self.memory

    def delays(self, work: Work) -> float:
        return work.wire / self.delay + work.calls * self.call

    def alone(self, work: Work, ranks: int) -> float:
        return work.wire / self.wire(ranks) + work.calls * self.latency(ranks)

    def device(self, work: Work, ranks: int, hidden: bool) -> float:
        compute, delays, alone = self.compute(work), self.delays(work), self.alone(work, ranks)
        return max(compute + delays, alone) if hidden and ranks > GPUS_OF_NODE else compute + max(delays, alone)

    def host(self, work: Work) -> float:
        return (work.hooks + work.leaves * self.leaf) * self.hook + work.launches * LAUNCH


@dataclass(frozen=True)
class Loss:
    """Head and loss of one micro batch."""

    work: Work
    held: float  # bytes at the peak beside x and what DeepSpeed keeps, less the dx that every way hands back


def sent(elements: float, ranks: int, times: float, calls: float, in_place: float = 0.0) -> Work:
    """Weights that DeepSpeed gathers, or whose gradients it reduces, so many times, with its copies of them.

    ``in_place``: how many of these times without a copy.
    """
    wire = times * 2 * elements * (ranks - 1) / ranks
    return Work(memory=(times - in_place) * 4 * elements, wire=wire, calls=calls)


def whole_head(vocab: int, hidden: int, ranks: int) -> Work:
    """Gathered for forward and, where it is too large to be kept until then, again for backward; its gradient."""
    times = 2 if vocab * hidden <= REUSE else 3
    return sent(vocab * hidden, ranks, times, times)


# bytes a logit of PyTorch's cross entropy in fp32: cast (2 + 4), log_softmax in three walks (12) with its output (4);
# backward zeros (4), the softmax's gradient (4 + 4, and 4 out), the cast back (4 + 2)
STOCK_LOSS_BYTES = 44
# held at the worst moment: logits in bf16 and fp32, log_softmax or the gradient in fp32, its bf16
STOCK_LOSS_HELD = 12
# so many tokens are multiplied with a weight in bf16 in the time that it is read in: 650 TFLOP/s, 3.0 TB/s
TOKENS_A_READ = 217
# two reads and a write of bf16 logits
FUSED_LOSS_BYTES = 6


def stock_loss(tokens: int, hidden: int, vocab: int) -> Loss:
    logits, weight = tokens * vocab, hidden * vocab
    work = Work(gemm=6 * logits * hidden, memory=STOCK_LOSS_BYTES * logits, launches=20)
    return Loss(work, STOCK_LOSS_HELD * logits + 2 * weight - 2 * tokens * hidden)


def liger_loss(tokens: int, hidden: int, vocab: int, chunk_mem_const: int = 1) -> Loss:
    """Gradients in the forward, chunk of tokens by chunk.

    The weight's is read and written for each: products of few tokens take as long as what they write. So do those that
    read the weight, by as much as a read takes longer than their FLOPs.
    """
    parts = -(-vocab // hidden)
    parts = -(-parts // chunk_mem_const)
    chunk = min(tokens, 1 << (-(-tokens // parts) - 1).bit_length())
    chunks = -(-tokens // chunk)
    # of 2 bytes, for logits and for their gradient
    reads = 2 * 2 * max(0.0, 1 - chunk / TOKENS_A_READ)
    work = Work(
        gemm=6 * tokens * vocab * hidden,
        memory=FUSED_LOSS_BYTES * tokens * vocab + (4 + reads) * vocab * hidden * chunks,
        launches=12 * chunks,
    )
    return Loss(work, 4 * vocab * hidden + 2 * chunk * vocab)


def whole_loss(
    tokens: int,
    hidden: int,
    vocab: int,
    chunk_mb: float = CHUNK_MB,
    keep_mb: float = 2048,
    grad_in_forward: bool = True,
) -> Loss:
    """ds_fused over a weight that is whole: the weight and its gradient are counted in what is held."""
    chunk, keep = int(chunk_mb * MIB), int(min(keep_mb * MIB, 2**62))
    # of one rank, so nothing is gathered
    figures = of_gather(HeadCosts(Shards(vocab, hidden, 1), (vocab,)), tokens, chunk, keep, grad_in_forward)
    work = Work(gemm=figures.flops, memory=figures.traffic, launches=10 * figures.chunks)
    return Loss(work, figures.held)


def sharded_loss(figures: Figures) -> Loss:
    work = Work(gemm=figures.flops, memory=figures.traffic, wire=figures.wire, calls=figures.calls)
    return Loss(work + Work(launches=4 * figures.calls), figures.held)


@dataclass(frozen=True)
class Way:
    """How a step is computed; names are end_to_end.py's."""

    name: str
    loss: str  # "stock", "liger" or "ours"
    fused: bool = True  # norms, rotary embedding and MLPs
    leaf: bool = False  # decoder layers are leaf modules of ZeRO-3: gathered as one
    sizes: str = "stock"  # of ZeRO-3
    # of a checkpointed layer: "full" is stock's; "unread": nothing is kept, but what nobody reads is left out of the
    # repetition; the others are levels of the JSON's key
    recompute: str = "full"
    keep_mb: int = KEEP_MB  # of the head
    tiles: int = 1  # of an MLP
    # inputs of checkpointed layers wait on the host, and what is kept of attention; None: where "fit" can't keep all
    offload: bool | None = False
    buffered: bool = False  # ours as it was, when weights came by way of DeepSpeed's buffers

    @property
    def in_place(self) -> bool:
        """Under ZeRO-3 weights come straight to their places."""
        return self.loss == "ours" and not self.buffered

    def bucket(self, shape: Shape) -> float:
        """Elements of gradients that are reduced together."""
        return min(self.zero_sizes(shape)["reduce_bucket_size"], shape.elements)

    def live(self, shape: Shape) -> float:
        """Elements of weights that may be gathered at a time."""
        return min(self.zero_sizes(shape)["stage3_max_live_parameters"], shape.elements)

    def group(self, shape: Shape) -> float:
        """Elements of weights after which the optimizer begins a new group."""
        return self.zero_sizes(shape)["sub_group_size"]

    def zero_sizes(self, shape: Shape) -> Mapping[str, float]:
        """Elements, by their names in the JSON."""
        if self.sizes in ("small", "large"):
            return sizes_of(self.sizes, shape.layer, shape.elements, whole=self.leaf)
        return {
            "stage3_prefetch_bucket_size": PREFETCH,
            "stage3_max_live_parameters": 2e9 if self.sizes == "2e9" else LIVE,
            "reduce_bucket_size": BUCKET,
            "sub_group_size": GROUP,
        }


WAYS = {
    way.name: way
    for way in (
        Way("hf", "stock", fused=False),
        Way("hf+leaf, stock sizes", "stock", fused=False, leaf=True),
        Way("hf+leaf", "stock", fused=False, leaf=True, sizes="2e9"),
        Way("liger", "liger"),
        Way("liger+leaf, stock sizes", "liger", leaf=True),
        # when a weight comes is nothing that a sum sees, and stage3_max_reuse_distance says how many stay
        Way("liger+leaf, larger prefetch", "liger", leaf=True),
        Way("liger+leaf", "liger", leaf=True, sizes="2e9"),
        Way("ours", "ours"),
        Way("ours-fast", "ours", leaf=True, sizes="large", recompute="fit"),
        # inputs and attention are on the host where the device has no room for everything
        Way("ours-fast-host", "ours", leaf=True, sizes="large", recompute="fit", offload=None),
        Way("ours-fast-attention", "ours", leaf=True, sizes="large", recompute="attention"),
        Way("ours-fast-full", "ours", leaf=True, sizes="large"),
        # its MLPs are whole up to 65535 tokens, which is as far as anything is predicted
        Way("ours-small", "ours", leaf=True, sizes="small", recompute="attention", keep_mb=0, offload=True),
        # before that: gathered module by module
        Way("ours-small-modules", "ours", sizes="small", recompute="attention", keep_mb=0, offload=True),
        Way("ours-small-tiled", "ours", sizes="small", recompute="attention", keep_mb=0, tiles=4, offload=True),
        # before that: nothing is kept, and inputs stay on the device
        Way("ours-small-device", "ours", sizes="small", recompute="unread", keep_mb=0, tiles=4),
        # as that, with inputs on the host: what the search for the longest sequence had
        Way("ours-small-inputs", "ours", sizes="small", recompute="unread", keep_mb=0, tiles=4, offload=True),
        Way("ours-small-untiled", "ours", sizes="small", keep_mb=0),
    )
}


@dataclass(frozen=True)
class Job:
    way: Way
    shape: Shape
    ranks: int
    micro_batch: int
    length: int = 8192
    stage: int = 3
    checkpoints: bool = True
    first: int | None = None  # micro batch of the first steps, of which "fit" measures what they need; None: the same

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length


def layer_bytes(way: Way, shape: Shape) -> tuple[float, float]:
    """B that the element-wise kernels of a layer move for a token, forward and backward."""
    d, f, rotated = shape.hidden, shape.intermediate, shape.q + shape.kv
    # of sums, two norms, rotary embedding, MLP. Two residual adds; back also where the gradients of q, k and v meet,
    # and those of gate and up
    sums = (2 * 6 * d, 5 * 6 * d)
    if way.fused:
        # every input and output once
        parts = [sums, (2 * 4 * d, 2 * 6 * d), (4 * rotated, 4 * rotated), (6 * f, 10 * f)]
    else:
        # norm: to fp32 (6), square (8), mean (4), times its root (8), to bf16 (6), times the weight (4); back 12, 6,
        # 24, 32 and two sums (18). rope: two products (8), half negated (2) and joined (4), sum (6); back the same with
        # zeros around each half. MLP: silu (4) and product (6); back 6 and 12
        parts = [sums, (2 * 36 * d, 2 * 92 * d), (20 * rotated, 30 * rotated), (10 * f, 18 * f)]
    if way.tiles > 1:
        # a tile's result, and back its dx, is copied to where those of all are
        parts.append((4 * d, 4 * d))
    return sum(forward for forward, _ in parts), sum(backward for _, backward in parts)


def sums_bytes(way: Way, shape: Shape) -> float:
    """B that are moved for the gradients of a tiled MLP's weights, fp32 sums over tiles.

    The first tile's are written by their products, those between read besides, and the last one's are added to the sum
    and rounded.
    """
    inner = 3 * shape.hidden * shape.intermediate
    return (4 * (way.tiles - 2) + 8) * inner if way.tiles > 1 else 0.0


def layer_held(way: Way, shape: Shape) -> float:
    """B that a layer's backward holds for a token beside the layer's input: what its forward kept, and gradients."""
    d, f = shape.hidden, shape.intermediate
    # the outputs of two norms, the residual and a gradient; q and the output of attention; k and v
    held = 2 * 4 * d + 2 * 2 * shape.q + 2 * 2 * shape.kv
    # gate, up, their product and its gradient; fused, the gradients of gate and up are written over them
    mlp = 2 * 4 * f
    if not way.fused:
        # both norms in fp32, before and after they are scaled; silu, and the gradients of gate and up
        held += 2 * 2 * 4 * d
        mlp += 2 * 3 * f
    if way.tiles > 1:
        # of one tile, with its result and its dx; and dx of all
        return held + (mlp + 2 * 2 * d) / way.tiles + 2 * d
    return held + mlp


def gradient_bytes(way: Way, shape: Shape) -> float:
    """Of a layer's largest weight, as its product makes it; of a tiled MLP also the sums in fp32."""
    inner = shape.hidden * shape.intermediate
    return 2 * inner + (4 * 3 * inner if way.tiles > 1 else 0)


@dataclass(frozen=True)
class Kept:
    """How many checkpointed layers, from the last on, keep the outputs of attention, and how many those of products."""

    attention: int = 0
    matmuls: int = 0
    unread: bool = False  # what a repetition computes and nobody reads is left out: a layer's last product
    on_host: bool = False  # inputs wait there, and attention


def attention_bytes(shape: Shape) -> float:
    """Of a layer and token."""
    return 2 * shape.q


def matmul_bytes(shape: Shape) -> float:
    """q, k, v, the projection, gate and up."""
    return 2 * (shape.q + 2 * shape.kv + shape.hidden + 2 * shape.intermediate)


def kept(job: Job, machine: Machine) -> Kept:
    level, layers, offload = job.way.recompute, job.shape.layers, job.way.offload
    if not job.checkpoints or level == "full":
        return Kept(on_host=bool(job.checkpoints and offload))
    if level == "unread":
        return Kept(unread=True, on_host=bool(offload))
    if level != "fit":
        return Kept(layers, layers * (level == "matmuls"), True, bool(offload))
    attention, matmuls = (job.tokens * of(job.shape) for of in (attention_bytes, matmul_bytes))
    room = kept_room(job, machine, Kept())
    with_attention = _fitting(room, attention, layers)
    found = Kept(with_attention, _fitting(room - with_attention * attention, matmuls, with_attention), True)
    if offload is False or (offload is None and found.matmuls == layers):
        return found
    sent = Kept(layers, 0, True, on_host=True)
    return replace(sent, matmuls=_fitting(kept_room(job, machine, sent), matmuls, layers))


def _fitting(room: float, one: float, most: int) -> int:
    return max(0, min(most, int(room // one)))


def kept_room(job: Job, machine: Machine, measured: Kept) -> float:
    """Bytes, as ds_fused.modules.memory.allotment has them: a longer batch is taken to need more in proportion.

    ``measured``: what is kept, and where, by the first steps.
    """
    first = replace(job, micro_batch=job.first or job.micro_batch)
    rise = _peak_bytes(first, machine, measured) - _start_bytes(first)
    return KEPT_SHARE * machine.room - _start_bytes(job) - rise * max(1.0, job.tokens / first.tokens)


def _start_bytes(job: Job) -> float:
    """What is there when the first layer begins: its input, its weights, and those fetched ahead."""
    shape, way = job.shape, job.way
    ahead = way.zero_sizes(shape)["stage3_prefetch_bucket_size"]
    weights = 2 * (shape.layer + ahead) if job.stage == 3 else 0.0
    return states_bytes(job) + _bucket_bytes(job) + weights + 2 * shape.hidden * job.tokens


def _bucket_bytes(job: Job) -> float:
    """ZeRO-3 always has the room in which gradients travel."""
    return 2 * job.way.bucket(job.shape) if job.stage == 3 else 0.0


def loss_of(job: Job, machine: Machine) -> Loss:
    """Head and loss; of a whole weight without the gathers, which are counted with the model's others."""
    shape, way = job.shape, job.way
    if way.loss == "stock":
        return stock_loss(job.tokens, shape.hidden, shape.vocab)
    if way.loss == "liger":
        return liger_loss(job.tokens, shape.hidden, shape.vocab)
    if job.stage < 3 or job.ranks == 1:
        return whole_loss(job.tokens, shape.hidden, shape.vocab)
    return sharded_loss(head_figures(job, machine))


def head_figures(job: Job, machine: Machine) -> Figures:
    """Those of the mode for our head that "auto" picks of the two, where memory is no matter."""
    shape, way = job.shape, job.way
    head = HeadCosts.cut(Shards(shape.vocab, shape.hidden, job.ranks), SLAB_MB * MIB)
    both = sharded(head, job.tokens, CHUNK_MB * MIB, way.keep_mb * MIB)
    return chosen(both, float("inf"), machine.rates(job.ranks))


def layers_work(job: Job, machine: Machine) -> tuple[Work, Work]:
    """Of the forward, and of the backward with its repetition."""
    return _layers_work(job, kept(job, machine))


# a fit asks for the same ones thousands of times
@functools.cache
def _layers_work(job: Job, spared: Kept) -> tuple[Work, Work]:
    shape, way, tokens, repeated = job.shape, job.way, job.tokens, int(job.checkpoints)
    # of a tiled MLP the repetition runs in the backward's tiles, whose first one does compute its result
    unread = spared.unread * shape.hidden * shape.intermediate * (1 - (way.tiles > 1) / way.tiles)
    forward_bytes, backward_bytes = layer_bytes(way, shape)
    # causal: half of the square; backward is 2.5 forwards
    attention = 2 * job.length * tokens * shape.q
    # modules of a layer of Llama's that have hooks of their own, with weights and without: a fused MLP does not call
    # its activation, and a tiled one of five is gathered as one
    weighty, others = (7, 2) if way.tiles > 1 else (9, 4 - way.fused)
    hooks = (0 if way.leaf else weighty + EMPTY * others) * (job.stage == 3)
    leaves = int(way.leaf and job.stage == 3)
    # of the host: an op of Liger's takes it as long as the kernels that it replaces, ours half of that (h100/ops.md)
    launches = 20 if way.loss == "ours" else 45
    # of an MLP's products and kernels six
    in_tiles, of_tiles = 6 * (way.tiles - 1), TILE_LAUNCHES * (way.tiles - 1)
    # of a layer's input, its attention and the log-sum-exp of that: memory, what to wait for, a copy and an event
    moved = 3 * 4 * spared.on_host
    one = Work(
        gemm=2 * shape.layer * tokens,
        attention=attention,
        memory=forward_bytes * tokens,
        hooks=hooks,
        leaves=leaves,
        launches=launches + in_tiles + moved,
    )
    other = Work(
        gemm=(4 * shape.layer + 2 * repeated * (shape.layer - unread)) * tokens,
        attention=(2.5 + repeated) * attention,
        memory=(backward_bytes + repeated * forward_bytes) * tokens + sums_bytes(way, shape),
        hooks=(1 + repeated) * hooks,
        leaves=(1 + repeated) * leaves,
        launches=(1 + repeated) * (launches + in_tiles) + of_tiles + moved,
    )
    not_repeated = Work(
        gemm=2 * (shape.layer - shape.hidden * shape.intermediate) * tokens * spared.matmuls,
        attention=attention * spared.attention,
    )
    return one.times(shape.layers), other.times(shape.layers) + not_repeated.times(-1)


@functools.cache
def transfers_work(job: Job) -> tuple[Work, Work]:
    """What ZeRO sends forward and back. Mode "stream" or "stationary" sends the head's weight by itself."""
    shape, ranks = job.shape, job.ranks
    if ranks == 1:
        return Work(), Work()
    buckets = -(-shape.elements // job.way.bucket(shape))
    if job.stage < 3:
        # gradients are reduced and weights gathered, or gradients all-reduced, which is the same
        return Work(), sent(shape.elements, ranks, 2, 2 * buckets)
    rest = shape.elements - shape.head
    # a module's weights come with its neighbours' while they fit a prefetch bucket: a layer's in so many calls.
    # Of a checkpointed layer, what comes for the repetition stays for the backward
    calls = (1 if job.way.leaf else min(7, -(-shape.layer // PREFETCH))) * shape.layers + 1
    # of a gradient, what divides it takes the place of a copy
    back = sent(rest, ranks, 2, calls + buckets, in_place=job.way.in_place)
    if job.way.loss != "ours":
        back += whole_head(shape.vocab, shape.hidden, ranks)
    return sent(rest, ranks, 1, calls, in_place=job.way.in_place), back


def update_seconds(job: Job, machine: Machine) -> float:
    """The optimizer's."""
    elements = job.shape.elements / (job.ranks if job.stage else 1)
    return ADAM * elements + OPTIMIZER_BYTES * elements / machine.memory


def phases(job: Job, machine: Machine, hidden: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """(device, host) seconds of the forward through the layers, and of head, loss and backward."""
    forward, backward = map(Work.__add__, layers_work(job, machine), transfers_work(job))
    loss = loss_of(job, machine).work
    # the head's transfers are between its products, which wait for them
    head = machine.device(loss, job.ranks, hidden=False)
    return (
        (machine.device(forward, job.ranks, hidden), machine.host(forward)),
        (head + machine.device(backward, job.ranks, hidden), machine.host(loss + backward)),
    )


def step_seconds(job: Job, machine: Machine, hidden: bool = False) -> float:
    return machine.wait + sum(map(max, phases(job, machine, hidden))) + update_seconds(job, machine)


def host_seconds(job: Job, machine: Machine) -> float:
    """For which the device waits, as no transfer is hidden."""
    return sum(max(0.0, host - device) for device, host in phases(job, machine, hidden=False))


def kernels_seconds(job: Job, machine: Machine) -> float:
    """Products and attention alone; transfers beside them make them longer."""
    parts = (*layers_work(job, machine), *transfers_work(job), Work(gemm=6 * job.tokens * job.shape.head))
    work = sum(parts, Work())
    return machine.device(replace(work, memory=0.0), job.ranks, hidden=False)


def attention_seconds(job: Job, machine: Machine) -> float:
    return sum(work.attention for work in layers_work(job, machine)) / machine.attention


def states_bytes(job: Job) -> float:
    """Between steps: weights and gradients in bf16, master copy and two moments in fp32, as the stage shares them.

    Stage 2 lets go of its gradients with the update.
    """
    whole, shared = {0: (16, 0), 1: (4, 12), 2: (2, 12), 3: (0, 16)}[job.stage]
    return job.shape.elements * (whole + shared / job.ranks)


@functools.cache
def largest_group(shape: Shape, ranks: int, size: float) -> float:
    """Elements of a rank that the optimizer updates together, at most: weights in the model's order, until they are
    ``size``. None is cut, and the last may be a head."""
    ends = [shape.head] * (1 if shape.tied else 2)
    largest = group = 0.0
    for weight in (ends[0], *shape.weights * shape.layers, *ends[1:]):
        group += weight / ranks
        largest = max(largest, group)
        group = 0.0 if group >= size else group
    return largest


def peak_bytes(job: Job, machine: Machine) -> float:
    return _peak_bytes(job, machine, kept(job, machine))


def _peak_bytes(job: Job, machine: Machine, spared: Kept) -> float:
    """The largest of what the loss, the last layer's backward and the optimizer hold, beside what is always there."""
    shape, way, tokens = job.shape, job.way, job.tokens
    always = states_bytes(job) + _bucket_bytes(job)
    update = weights = 0.0
    if job.stage == 2:
        # gradients as they came, flat, and in fp32
        update = 8 * shape.elements / job.ranks
    if job.stage == 3:
        # a group's gradients as they came and in fp32; no weight is gathered then
        update = 6 * largest_group(shape, job.ranks, way.group(shape))
        weights = 2 * way.live(shape)
        if way.leaf:
            if not way.in_place:
                # a layer comes in one buffer, of which its weights are copied
                weights += 2 * shape.layer
            if way.loss != "ours":
                # the next layer comes whole while this one's weight and gradient are there; ours counts it as live,
                # and sends gradients one by one
                weights += 3 * 2 * shape.layer
    one = layer_held(way, shape) * tokens
    attention, matmuls = attention_bytes(shape), matmul_bytes(shape)
    inputs, attentions = shape.layers, spared.attention
    if spared.on_host:
        # of the layer that is repeated, and the next one's on their way from the host
        inputs, attentions = min(2, inputs), min(2, attentions)
    waiting = (2 * shape.hidden * inputs + attention * attentions + matmuls * spared.matmuls) * tokens
    if job.checkpoints:
        # of a layer that keeps its own, the repetition does not make them a second time
        one -= (attention * (spared.attention > 0) + matmuls * (spared.matmuls > 0)) * tokens
    else:
        waiting, one = waiting + one * shape.layers, 0.0
    loss = loss_of(job, machine).held
    if way.loss != "ours" or job.stage < 3:
        # the head's weight is one of those that are gathered, or always there
        loss -= 2 * shape.head
    # x and the output of the last norm, and a gradient; not fused, the norm has x in fp32 as well
    loss += (2 * 3 + 4 * (not way.fused)) * shape.hidden * tokens
    return always + max(update, weights + waiting + max(one + gradient_bytes(way, shape), loss))
