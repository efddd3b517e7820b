from tests.backend import caller, database, fabric, new_tenant, postgres, state_dir

__all__ = ["caller", "database", "fabric", "new_tenant", "postgres", "state_dir"]
