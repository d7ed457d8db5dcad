"""What can be seen from outside: the GPUs of this machine, the times of a start, what is missing for one.

Nothing here touches CUDA or imports torch; a machine without a driver is as good as one with eight GPUs.
"""
