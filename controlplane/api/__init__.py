"""HTTP: routers by audience. Nothing here decides; services do."""
