"""What ops of several rooms share: launches, tiles, meetings of programs, options, the way to autograd."""
