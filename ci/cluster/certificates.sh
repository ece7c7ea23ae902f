#!/bin/bash
# certificates.sh DIR: makes the cluster's keys and certificates in DIR/pki and its kubeconfig files in DIR/conf.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
cd "$1/pki"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }

certificate() { # NAME SUBJECT [NAMES]
    key "$1"
    printf 'extendedKeyUsage=clientAuth,serverAuth\n%s\n' "${3:+subjectAltName=$3}" > "$1.ext"
    openssl req -new -key "$1.key" -subj "$2" |
        openssl x509 -req -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile "$1.ext" -out "$1.crt" 2>/dev/null
}

key ca
openssl req -x509 -new -key ca.key -out ca.crt -days 365 -subj /CN=kube-ca
names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
names=$names,DNS:localhost,IP:127.0.0.1,IP:$API_SERVICE_IP,IP:$NODE_IP
certificate apiserver /CN=kube-apiserver "$names"
certificate kubelet "/O=system:nodes/CN=system:node:$NODE" "DNS:$NODE,IP:$NODE_IP"
certificate admin /O=system:masters/CN=admin
certificate kcm /CN=system:kube-controller-manager
certificate sched /CN=system:kube-scheduler
certificate proxy /CN=system:kube-proxy
key sa
openssl ec -in sa.key -pubout -out sa.pub 2>/dev/null

for user in admin kcm sched kubelet proxy; do
    cat > "../conf/$user.kubeconfig" <<END
apiVersion: v1
kind: Config
clusters:
- name: tutorial
  cluster: {server: "https://127.0.0.1:$CLUSTER_API_PORT", certificate-authority-data: $(base64 -w0 ca.crt)}
users:
- name: $user
  user: {client-certificate-data: $(base64 -w0 $user.crt), client-key-data: $(base64 -w0 $user.key)}
contexts:
- name: tutorial
  context: {cluster: tutorial, user: $user}
current-context: tutorial
END
done
