#!/usr/bin/env bash
# With docker-compose.yml running: makes the application at site-b answer at http://localhost:8080, where site-a listens.
set -euo pipefail
url=${ISTHMUS_URL:-https://localhost:8443}
token=${ISTHMUS_TOKEN:-$(docker compose exec -T controlplane cat state/operator.token)}
ca=${ISTHMUS_CA:-$(mktemp)}
[ -s "$ca" ] || docker compose exec -T controlplane cat state/ca.pem > "$ca"

create() {
    curl -sS --fail-with-body --cacert "$ca" -H "Authorization: APIToken $token" "$url$1" --data-binary @- >/dev/null
    echo "created $1"
}

create /api/web/namespaces <<<'{"metadata": {"name": "demo"}, "spec": {}}'
create /api/config/namespaces/shared/virtual_sites <<'JSON'
{"metadata": {"name": "both"}, "spec": {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName in (site-a, site-b)"]}}}
JSON
create /api/config/namespaces/system/site_mesh_groups <<'JSON'
{"metadata": {"name": "both"}, "spec": {"full_mesh": {"data_plane_mesh": {}}, "virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": "both"}]}}
JSON
create /api/config/namespaces/demo/origin_pools <<'JSON'
{"metadata": {"name": "application"}, "spec": {"port": 8000, "no_tls": {}, "origin_servers": [
  {"private_name": {"dns_name": "application", "inside_network": {}, "site_locator": {"site": {"namespace": "system", "name": "site-b"}}}}]}}
JSON
create /api/config/namespaces/demo/http_loadbalancers <<'JSON'
{"metadata": {"name": "application"}, "spec": {"domains": ["localhost"], "http": {"port": 8080},
 "advertise_custom": {"advertise_where": [{"site": {"network": "SITE_NETWORK_INSIDE", "site": {"namespace": "system", "name": "site-a"}}, "use_default_port": {}}]},
 "default_route_pools": [{"pool": {"name": "application"}, "weight": 1, "priority": 1}]}}
JSON
curl -sS --fail-with-body --cacert "$ca" -H "Authorization: APIToken $token" \
    "$url/api/config/namespaces/demo/http_loadbalancers/application/status?wait=applied&timeout=30s" >/dev/null
echo "Now try: curl http://localhost:8080/"
