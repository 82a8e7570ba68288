"""Who factorizes what: one owner per layer, or several processes by Heat; all receive."""
