"""How each library computes each op: one builder per op and provider, a file for each family of ops.

A builder takes a case's tensors and returns the call that is timed. It imports its library itself, so that a library
which is missing or broken costs its own row and nothing else.

    hf_eager         the function or module of transformers.models, called as its models call it; where it has none,
                     the formula in plain PyTorch
    compile          the same under torch.compile(fullgraph=True, dynamic=False)
    torch            PyTorch's own fused function, where there is one
    liger            liger_kernel, called as its own patches call it
    ds_fused         ours
"""
