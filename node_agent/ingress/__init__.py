"""The OpenAI API as values: requests in, answers out. The HTTP server is an adapter."""
