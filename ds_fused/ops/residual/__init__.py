"""The residual as more than one stream: hyper-connections, attention over the layers' outputs."""
