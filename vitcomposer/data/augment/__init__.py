"""What is drawn for and done to the pixels of training images, on the CPU and on the device."""
