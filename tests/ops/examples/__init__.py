"""Of each op, in the file of its name: ``compiled`` launches its kernels, ``traced`` says what to call with what."""
