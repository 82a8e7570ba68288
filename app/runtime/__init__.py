"""Launch, processes and devices, leases of folders, watchdog, agreed stops and start-up check."""
