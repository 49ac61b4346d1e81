"""Which rows could matter to a query: exact search, and compressed indices built with faiss."""
