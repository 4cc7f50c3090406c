"""Draws and applies the augmentations of training images, on the CPU and on the device."""
