"""What a load balancer does with origins at sites of which the control plane hears nothing."""

from controlplane.resources.base import Choice

LOST_SITES_CHOICE = Choice(
    "lost_sites_choice", ("deprioritize_lost_sites", "evict_lost_sites", "keep_lost_sites"), default="deprioritize_lost_sites"
)
