"""Commands of `flashrt` that need robots and bags; flashrt_runtime.cli.plugins finds them."""
