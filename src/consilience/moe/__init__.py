"""Sparse mixtures of experts from dense models: their MLPs side by side in every layer, and a router of prompts.

    consilience merge moe.yaml mixture/

The recipe is mergekit-moe's. An output is a plan of copies, so it is streamed, verified, resumed and installed as any
merge is (``engine``); what is computed are the routers alone (``gates``), and how they do on prompts (``check``).
"""
