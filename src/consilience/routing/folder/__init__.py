"""Routed models on disk: recipes, building, loading, adding and removing experts."""
