"""Ready-made callbacks for training frameworks, which none of them is imported for but its own.

``oialr.integrations.lightning``, ``oialr.integrations.huggingface`` and ``oialr.integrations.timm``
stand alone; docs/integrations.md shows each with its example.
"""
