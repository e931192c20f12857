"""What a map or image is, whoever uses it."""
