"""The protocols: each file reads one's bodies and renders its answers; none knows another."""
