"""Local routers: how a token's activation recognises an expert."""
