"""HTTP and text: from request bytes to token ids, and back."""
