"""A Kubernetes API emulator: the kinds that agents read and manifests consist of, with the versions, watches, roles and refusals of a real API server.

There are no controllers: nobody turns pods into EndpointSlices but whoever writes them.
"""
