"""A Kubernetes API emulator: the kinds that discovery reads, with the versions, watches and refusals of a real API server.

There are no controllers: nobody turns pods into EndpointSlices but whoever writes them.
"""
