#!/usr/bin/env bash
# The demo of docker-compose.yml: waits for both sites, creates the bank with lab/demo.sh, and uses it once, as a customer would.
#
# ISTHMUS_URL, ISTHMUS_CA, SITE_A and SITE_B as there; ISTHMUS_TOKEN_FILE holds the operator's token.
set -euo pipefail
ISTHMUS_TOKEN=$(cat "$ISTHMUS_TOKEN_FILE")
export ISTHMUS_TOKEN

# online SITE: whether it serves
online() {
    curl --silent --fail --cacert "$ISTHMUS_CA" -H "Authorization: APIToken $ISTHMUS_TOKEN" \
        "$ISTHMUS_URL/api/config/namespaces/system/sites/$1" | grep -qE '"site_state": ?"ONLINE"'
}
for site in "$SITE_A" "$SITE_B" ${EDGES:-}; do
    until online "$site"; do sleep 1; done
    echo "Site $site is online."
done

bash "${0%/*}/bank.sh"

# bank ARGUMENTS…: asks the bank at SITE_A, for as long as its parts may take to be found healthy
bank() {
    curl --silent --show-error --fail --retry 30 --retry-all-errors --retry-delay 1 -H 'Host: bank.localhost' "$@"
}
echo "A transfer, accepted at $SITE_B:"
bank --json '{"from": "ada", "to": "grace", "amount": 250}' "http://$SITE_A:8080/api/transfers"
echo "The front page, made at $SITE_A, has the new balance:"
bank "http://$SITE_A:8080/" | grep -o 999750
echo "The demo works. The bank: http://bank.localhost:8080/"
