"""Methods for vision transformers: what attention looked at, and relevance through attention."""
