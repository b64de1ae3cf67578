"""HTTP and text: from a request's bytes to token ids, and from token ids to bytes."""
