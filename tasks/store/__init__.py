"""Where intermediates live: written once, addressed by content, verified on read."""
