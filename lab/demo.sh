#!/usr/bin/env bash
# The bank, as objects of the control plane. Needs two registered sites, bash and curl; run it as often as you like.
#
#   ISTHMUS_URL    of the control plane, such as https://127.0.0.1:8443
#   ISTHMUS_CA     file with the certificate authority of that URL
#   ISTHMUS_TOKEN  an API token; the control plane writes the operator's to a file
#   SITE_A SITE_B  names of the sites (cluster-a and cluster-b)
#   ORIGINS        `services` of Kubernetes (the default), or `names` that the sites look up
set -euo pipefail
SITE_A=${SITE_A:-cluster-a} SITE_B=${SITE_B:-cluster-b}
bold=$'\e[1m' plain=$'\e[0m'
[ -t 1 ] || bold='' plain=''

# call METHOD PATH: sends what it reads, prints the answer, fails unless it is 2xx (0: fine, 22: refused)
call() {
    curl --silent --show-error --fail-with-body --cacert "$ISTHMUS_CA" -H "Authorization: APIToken $ISTHMUS_TOKEN" \
        -H 'Content-Type: application/json' -X "$1" "$ISTHMUS_URL$2" --data-binary @-
}

# apply COLLECTION NAME: creates the object that it reads, or replaces it when it exists
apply() {
    local body answer
    body=$(cat)
    printf '%s\n' "${bold}curl -X POST \$ISTHMUS_URL$1 -d '$body'${plain}"
    if ! answer=$(call POST "$1" <<<"$body"); then
        [[ $answer == *'"code":6'* || $answer == *'"code": 6'* ]] || { echo "$answer" >&2; return 1; }
        answer=$(call PUT "$1/$2" <<<"$body") || { echo "$answer" >&2; return 1; }
    fi
    printf '  → revision %s\n\n' "$(grep -oE '"revision": ?[0-9]+' <<<"$answer" | grep -oE '[0-9]+' | tail -1)"
}

# applied PATH: waits until every site concerned has it
applied() {
    printf '%s\n' "${bold}curl \$ISTHMUS_URL$1/status?wait=applied${plain}"
    call GET "$1/status?wait=applied&timeout=30s" </dev/null >/dev/null
    printf '  → applied\n\n'
}

config=/api/config/namespaces

echo "A namespace for the bank's objects."
apply /api/web/namespaces bank <<JSON
{"metadata": {"name": "bank"}, "spec": {}}
JSON

echo "Which sites take part, by their labels, and that they tunnel to each other directly, or through a regional edge if that fails."
apply $config/shared/virtual_sites bank-clusters <<JSON
{"metadata": {"name": "bank-clusters"},
 "spec": {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["fabric in (lab)"]}}}
JSON
apply $config/system/site_mesh_groups bank <<JSON
{"metadata": {"name": "bank"},
 "spec": {"full_mesh": {"control_and_data_plane_mesh": {}},
          "virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": "bank-clusters"}],
          "enable_re_fallback": {}}}
JSON

echo "How to tell a working pod; the checks run in the pod's own cluster."
apply $config/bank/healthchecks alive <<JSON
{"metadata": {"name": "alive"},
 "spec": {"http_health_check": {"path": "/health", "use_origin_server_name": {}},
          "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 2}}
JSON
apply $config/bank/healthchecks connects <<JSON
{"metadata": {"name": "connects"},
 "spec": {"tcp_health_check": {}, "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 2}}
JSON

# pool NAME SITE PORT HEALTHCHECK: a service of one site
pool() {
    local origin="\"k8s_service\": {\"service_name\": \"$1.shop\", \"vk8s_networks\": {}"
    [ "${ORIGINS:-services}" = services ] || origin="\"private_name\": {\"dns_name\": \"$1\", \"inside_network\": {}"
    apply $config/bank/origin_pools "$1" <<JSON
{"metadata": {"name": "$1"},
 "spec": {"origin_servers": [{$origin,
                              "site_locator": {"site": {"namespace": "system", "name": "$2"}}}}],
          "port": $3, "no_tls": {}, "loadbalancer_algorithm": "ROUND_ROBIN", "healthcheck": [{"name": "$4"}]}}
JSON
}
echo "Services as origins: the front page runs in $SITE_A, everything else in $SITE_B."
pool web "$SITE_A" 8080 alive
pool transfers "$SITE_B" 8080 alive
pool referrals "$SITE_B" 8080 alive
pool ledger "$SITE_B" 5432 connects

echo "One HTTP load balancer in $SITE_A for all of the bank."
apply $config/bank/http_loadbalancers bank <<JSON
{"metadata": {"name": "bank"},
 "spec": {"domains": ["bank.localhost"], "http": {"port": 8080},
          "advertise_custom": {"advertise_where": [
            {"site": {"network": "SITE_NETWORK_INSIDE", "site": {"namespace": "system", "name": "$SITE_A"}}, "use_default_port": {}}]},
          "routes": [
            {"simple_route": {"path": {"prefix": "/api/transfers"}, "origin_pools": [{"pool": {"name": "transfers"}, "weight": 1, "priority": 1}]}},
            {"simple_route": {"path": {"prefix": "/api/referrals"}, "origin_pools": [{"pool": {"name": "referrals"}, "weight": 1, "priority": 1}]}}],
          "default_route_pools": [{"pool": {"name": "web"}, "weight": 1, "priority": 1}]}}
JSON

echo "A TCP load balancer for the ledger, in both."
apply $config/bank/tcp_loadbalancers ledger <<JSON
{"metadata": {"name": "ledger"},
 "spec": {"listen_port": 5432, "no_sni": {}, "tcp": {},
          "advertise_custom": {"advertise_where": [
            {"virtual_site": {"network": "SITE_NETWORK_INSIDE", "virtual_site": {"namespace": "shared", "name": "bank-clusters"}}, "use_default_port": {}}]},
          "origin_pools_weights": [{"pool": {"name": "ledger"}, "weight": 1, "priority": 1}]}}
JSON

echo "Wait until every Envoy concerned has it."
applied $config/bank/http_loadbalancers/bank
applied $config/bank/tcp_loadbalancers/ledger
