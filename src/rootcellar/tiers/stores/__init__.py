"""Stores, one file each: where pages lie when neither the device nor the host holds them."""
