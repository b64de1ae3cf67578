"""Rows, batches and the device. Nothing here sees text, JSON or HTTP."""
