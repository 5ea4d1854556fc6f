"""What a launch needs to know of GPUs that are not there."""

from swcompile.kernels.launch import DeviceFacts

H100 = DeviceFacts("H100", (9, 0), 132, 228 * 1024)
L40S = DeviceFacts("L40S", (8, 9), 142, 100 * 1024)
