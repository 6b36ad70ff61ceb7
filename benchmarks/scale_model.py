"""Time and memory of a training step as sums of physical quantities: what scale.py fits, checks and extends.

A step is so many FLOPs of products and of attention, bytes that element-wise kernels move, bytes on the wire,
collectives, hooks and launches of the host (`Work`). A `Machine` turns them into seconds:

    compute = product FLOPs / rate + attention FLOPs / rate + bytes moved / bandwidth
    delays  = bytes on the wire / rate + collectives * time of one           by how much transfers delay the products
    alone   = bytes on the wire / the slowest link's rate + collectives * latency of a ring
    device  = compute + delays                   on one node
              max(compute + delays, alone)       on several, where all that the network takes longer is hidden
              compute + max(delays, alone)       on several, where nothing of it is
    host    = hooks of ZeRO-3 * time of one + launches * time of one
    step    = max(device, host)

The head in modes "stream" and "stationary" is `ds_fused.engine.figures`, by which mode "auto" chooses.

Sizes: T tokens of a rank in a micro batch, W ranks. Bytes are of bf16 where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ds_fused.engine.figures import Figures, Head, Rates, candidates, chosen
from ds_fused.engine.shards import Shards
from ds_fused.ops._tiles import tile_elements, tiling

MIB = 2**20
GPUS_OF_NODE = 8
# bytes a second that a GPU of this kind can take in over NVLink
NVLINK = 450e9
# seconds of a hop of a ring within a node and between two, as NCCL's own model has them for protocol LL128 (tuning.cc)
HOP, NETWORK_HOP = 1.9e-6, 4.0e-6
# elements: DeepSpeed's stage3_prefetch_bucket_size and stage3_max_reuse_distance
PREFETCH, REUSE = 5e7, 1e9
# of an optimizer's step per parameter: master copy and two moments read and written (24 B), the gradient widened, read
# and its norm taken (12 B), the weight written and laid back (4 B)
OPTIMIZER_BYTES = 40
# the defaults of "fused_linear_cross_entropy"
CHUNK_MB, KEEP_MB, SLAB_MB = 512, 2048, 128
# of the memory, what layers may fill with what "recompute": "fit" keeps
KEPT_SHARE = 0.9
# seconds of the host for one launch of a kernel under autograd: assumed, since no measured point is bound by them
LAUNCH = 20e-6


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
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.intermediate)

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
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))

    def times(self, n: float) -> Work:
        return Work(*(n * getattr(self, field.name) for field in fields(Work)))


@dataclass(frozen=True)
class Machine:
    """Rates in SI units; those that are fitted come from scale_fit.py."""

    gemm: float
    attention: float
    memory: float
    delay: float  # bytes over NVLink for each second by which the products are later
    call: float  # seconds of a collective beside its bytes and hops
    hook: float  # seconds of the host
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
        return work.hooks * self.hook + work.launches * LAUNCH


@dataclass(frozen=True)
class Loss:
    """Head and loss of one micro batch."""

    work: Work
    held: float  # bytes at the peak beside x and what DeepSpeed keeps, less the dx that every way hands back


def sent(elements: float, ranks: int, times: float, calls: float) -> Work:
    """Weights that DeepSpeed gathers, or whose gradients it reduces, so many times, with its copies of them."""
    return Work(memory=times * 4 * elements, wire=times * 2 * elements * (ranks - 1) / ranks, calls=calls)


def whole_head(vocab: int, hidden: int, ranks: int) -> Work:
    """Gathered for forward and, where it is too large to be kept until then, again for backward; its gradient."""
    times = 2 if vocab * hidden <= REUSE else 3
    return sent(vocab * hidden, ranks, times, times)


# bytes a logit of PyTorch's cross entropy in fp32: cast (2 + 4), log_softmax in three walks (12) with its output (4);
# backward zeros (4), the softmax's gradient (4 + 4, and 4 out), the cast back (4 + 2)
STOCK_LOSS_BYTES = 44
# held at the worst moment: logits in bf16 and fp32, log_softmax or the gradient in fp32, its bf16
STOCK_LOSS_HELD = 12
# two reads and a write of bf16 logits
FUSED_LOSS_BYTES = 6


def stock_loss(tokens: int, hidden: int, vocab: int) -> Loss:
    logits, weight = tokens * vocab, hidden * vocab
    work = Work(gemm=6 * logits * hidden, memory=STOCK_LOSS_BYTES * logits, launches=20)
    return Loss(work, STOCK_LOSS_HELD * logits + 2 * weight - 2 * tokens * hidden)


def liger_loss(tokens: int, hidden: int, vocab: int, chunk_mem_const: int = 1) -> Loss:
    """Gradients in the forward, chunk of tokens by chunk.

    The weight's is read and written for each: products of few tokens take as long as what they write.
    """
    parts = -(-vocab // hidden)
    parts = -(-parts // chunk_mem_const)
    chunk = min(tokens, 1 << (-(-tokens // parts) - 1).bit_length())
    chunks = -(-tokens // chunk)
    work = Work(
        gemm=6 * tokens * vocab * hidden,
        memory=FUSED_LOSS_BYTES * tokens * vocab + 4 * vocab * hidden * chunks,
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
    if grad_in_forward:
        cut = tiling(tokens, vocab, 2, chunk, 0, dx=True, dweight=False)
        chunks = -(-tokens // cut.tokens)
        made_again, moved, held = 0.0, 2 * vocab * hidden * (chunks - 1), tile_elements(cut.tokens, cut.rows) * 2
    else:
        cut = tiling(tokens, vocab, 2, chunk, keep, dx=True, dweight=True)
        slabs, chunks = -(-vocab // cut.rows), -(-tokens // cut.tokens)
        made_again = 2 * (1 - min(1.0, cut.kept / (slabs * chunks)))
        moved = 4 * tokens * hidden * (slabs - 1)
        rooms = cut.kept + (cut.kept < slabs * chunks)
        held = rooms * tile_elements(cut.tokens, cut.rows) * 2 + (4 * tokens * hidden if slabs > 1 else 0)
    work = Work(
        gemm=(6 + made_again) * tokens * vocab * hidden,
        memory=FUSED_LOSS_BYTES * tokens * vocab + moved,
        launches=10 * chunks,
    )
    return Loss(work, 4 * vocab * hidden + held)


def sharded_loss(figures: Figures) -> Loss:
    work = Work(gemm=figures.flops, memory=figures.traffic, wire=figures.wire, calls=figures.calls)
    return Loss(work + Work(launches=4 * figures.calls), figures.held)


@dataclass(frozen=True)
class Way:
    """How a step is computed; names are end_to_end.py's."""

    name: str
    loss: str  # "stock", "liger" or "ours"
    fused: bool = True  # norms, rotary embedding and MLPs
    leaf: bool = False  # decoder layers are leaf modules of ZeRO-3: gathered as one, one hook
    sizes: str = "stock"  # of ZeRO-3
    recompute: str = "full"  # of a checkpointed layer; see the JSON's key
    keep_mb: int = KEEP_MB

    def bucket(self, shape: Shape) -> float:
        """Elements of gradients that are reduced together."""
        by_layer = {"small": shape.layer / 8, "large": shape.layer}
        return min(5e8, by_layer.get(self.sizes, 5e8), shape.elements)

    def live(self, shape: Shape) -> float:
        """Elements of weights that may be gathered at a time."""
        by_layer = {"small": 2 * shape.layer + PREFETCH, "large": max(1e9, 2 * shape.layer) + 3 * shape.layer}
        return min({"stock": 1e9, "2e9": 2e9}.get(self.sizes) or by_layer[self.sizes], shape.elements)


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
        Way("ours-fast-attention", "ours", leaf=True, sizes="large", recompute="attention"),
        Way("ours-fast-full", "ours", leaf=True, sizes="large"),
        Way("ours-small", "ours", sizes="small", keep_mb=0),
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

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length


def layer_bytes(way: Way, shape: Shape, checkpoints: bool) -> float:
    """B that the element-wise kernels of a layer move for a token, forward (twice under checkpoints) and backward."""
    d, f, rotated = shape.hidden, shape.intermediate, shape.q + shape.kv
    # (forward, backward) of sums, two norms, rotary embedding, MLP. Two residual adds; back also where the gradients of
    # q, k and v meet, and those of gate and up
    sums = (2 * 6 * d, 5 * 6 * d)
    if way.fused:
        # every input and output once
        parts = [sums, (2 * 4 * d, 2 * 6 * d), (4 * rotated, 4 * rotated), (6 * f, 10 * f)]
    else:
        # norm: to fp32 (6), square (8), mean (4), times its root (8), to bf16 (6), times the weight (4); back 12, 6,
        # 24, 32 and two sums (18). rope: two products (8), half negated (2) and joined (4), sum (6); back the same with
        # zeros around each half. MLP: silu (4) and product (6); back 6 and 12
        parts = [sums, (2 * 36 * d, 2 * 92 * d), (20 * rotated, 30 * rotated), (10 * f, 18 * f)]
    return sum((1 + checkpoints) * forward + backward for forward, backward in parts)


def layer_held(way: Way, shape: Shape) -> float:
    """B that a layer's backward holds for a token: what its forward kept, and the gradients that meet it."""
    d, f = shape.hidden, shape.intermediate
    # x, two norms, the projection, the residual and a gradient; q and attention; k and v, and k turned
    held = 2 * 6 * d + 2 * 2 * shape.q + 2 * 3 * shape.kv
    # gate, up, their product and its gradient; fused, the gradients of gate and up are written over them
    held += 2 * 4 * f
    if not way.fused:
        # both norms in fp32, before and after they are scaled; silu, and the gradients of gate and up
        held += 2 * 2 * 4 * d + 2 * 3 * f
    return held


@dataclass(frozen=True)
class Kept:
    """Which share of checkpointed layers keep the outputs of attention, and of which those of products."""

    attention: float = 0.0
    matmuls: float = 0.0
    last: bool = False  # a layer's last product, whose result a repetition does not need, is not repeated


def attention_bytes(shape: Shape) -> float:
    """Of a layer and token."""
    return 2 * shape.q


def matmul_bytes(shape: Shape) -> float:
    """q, k, v, the projection, gate and up."""
    return 2 * (shape.q + 2 * shape.kv + shape.hidden + 2 * shape.intermediate)


def kept(job: Job, machine: Machine) -> Kept:
    level = job.way.recompute
    if not job.checkpoints or level == "full":
        return Kept()
    if level != "fit":
        return Kept(1.0, float(level == "matmuls"), True)
    room = KEPT_SHARE * machine.room - _peak_bytes(job, machine, Kept())
    attention, matmuls = (job.shape.layers * job.tokens * of(job.shape) for of in (attention_bytes, matmul_bytes))
    return Kept(_share(room, attention), _share(room - attention, matmuls), True)


def _share(room: float, wanted: float) -> float:
    return min(1.0, max(0.0, room / wanted))


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
    """Those of the mode that "auto" picks for our head where memory is no matter."""
    shape, way = job.shape, job.way
    head = Head.cut(Shards(shape.vocab, shape.hidden, job.ranks), SLAB_MB * MIB)
    both = candidates(head, job.tokens, CHUNK_MB * MIB, way.keep_mb * MIB)
    return chosen(both, float("inf"), machine.rates(job.ranks))


def layers_work(job: Job, machine: Machine) -> Work:
    shape, way, tokens = job.shape, job.way, job.tokens
    forwards = 1 + job.checkpoints
    passes = forwards + 1
    spared = kept(job, machine)
    last = shape.hidden * shape.intermediate * spared.last
    products = (2 * forwards + 4) * shape.layer - 2 * (last + (shape.layer - last) * spared.matmuls)
    one = Work(
        gemm=products * tokens,
        # causal: half of the square; backward is 2.5 forwards
        attention=(forwards + 2.5 - spared.attention) * 2 * job.length * tokens * shape.q,
        memory=layer_bytes(way, shape, job.checkpoints) * tokens,
        # 13 modules with hooks of their own in a layer of Llama's
        hooks=passes * (1 if way.leaf else 13) if job.stage == 3 else 0,
        launches=passes * (20 if way.fused else 45),
    )
    return one.times(shape.layers)


def states_work(job: Job) -> Work:
    """What ZeRO sends and the optimizer does. Mode "stream" or "stationary" sends the head's weight by itself."""
    shape, ranks = job.shape, job.ranks
    update = Work(memory=OPTIMIZER_BYTES * shape.elements / (ranks if job.stage else 1))
    if ranks == 1:
        return update
    buckets = -(-shape.elements // job.way.bucket(shape))
    if job.stage < 3:
        # gradients are reduced and weights gathered, or gradients all-reduced, which is the same
        return update + sent(shape.elements, ranks, 2, 2 * buckets)
    rest = shape.elements - shape.head
    # a module's weights come with its neighbours' while they fit a prefetch bucket: a layer's in so many calls.
    # Of a checkpointed layer, what comes for the repetition stays for the backward
    alone = 1 if job.way.leaf else min(7, -(-shape.layer // PREFETCH))
    work = update + sent(rest, ranks, 3, calls=2 * (alone * shape.layers + 1) + buckets)
    return work if job.way.loss == "ours" else work + whole_head(shape.vocab, shape.hidden, ranks)


def device_seconds(job: Job, machine: Machine, hidden: bool) -> float:
    body = layers_work(job, machine) + states_work(job)
    # the head's transfers are between its products, which wait for them
    head = machine.device(loss_of(job, machine).work, job.ranks, hidden=False)
    return machine.device(body, job.ranks, hidden) + head


def host_seconds(job: Job, machine: Machine) -> float:
    return machine.host(layers_work(job, machine) + loss_of(job, machine).work)


def step_seconds(job: Job, machine: Machine, hidden: bool = False) -> float:
    return max(device_seconds(job, machine, hidden), host_seconds(job, machine))


def kernels_seconds(job: Job, machine: Machine) -> float:
    """Products and attention alone; transfers beside them make them longer."""
    work = layers_work(job, machine) + Work(gemm=6 * job.tokens * job.shape.head) + states_work(job)
    return machine.device(replace(work, memory=0.0), job.ranks, hidden=False)


def states_bytes(job: Job) -> float:
    """Weights and gradients in bf16, master copy and two moments in fp32, as the stage shares them."""
    shared = {0: 0, 1: 12, 2: 14, 3: 16}[job.stage]
    return job.shape.elements * (16 - shared + shared / job.ranks)


def peak_bytes(job: Job, machine: Machine) -> float:
    return _peak_bytes(job, machine, kept(job, machine))


def _peak_bytes(job: Job, machine: Machine, spared: Kept) -> float:
    """The larger of what the loss and what the last layer's backward hold, beside what is always there."""
    shape, way = job.shape, job.way
    always = states_bytes(job) + 2 * way.bucket(shape)
    if job.stage == 3:
        always += 2 * way.live(shape)
        if way.leaf and way.loss != "ours":
            # the next layer comes whole while this one's weight and gradient are there; ours counts it as live, and
            # sends gradients one by one
            always += 3 * 2 * shape.layer
    one = layer_held(way, shape) * job.tokens
    each = 2 * shape.hidden + attention_bytes(shape) * spared.attention + matmul_bytes(shape) * spared.matmuls
    waiting = each * shape.layers * job.tokens
    if not job.checkpoints:
        waiting, one = one * shape.layers, 0.0
    loss = loss_of(job, machine).held
    return always + waiting + max(one, loss + 2 * shape.hidden * job.tokens)
