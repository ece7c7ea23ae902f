// CoreDNS with the plugins of the Corefile in manifests/coredns.yaml, and no others: the stock
// main package also links the AWS, Azure and Google clients (1.5 times the build time, 20 MB more).
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

// the order in which plugins handle a query, as in CoreDNS's plugin.cfg
func init() {
	dnsserver.Directives = []string{"reload", "ready", "health", "errors", "cache", "kubernetes"}
}

func main() { coremain.Run() }
