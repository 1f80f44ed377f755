//! New certificates for nodes whose own are getting old.

use std::sync::Arc;
use std::time::Duration;

use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;
use army_node_api::requests::{InstallCertificateRequest, RenewalRequest};

use crate::{Controller, Node, Result, blocking, deadlines, loops};

/// How often hosts are asked. A host wants a new certificate weeks before the old one ends, so a
/// round that it misses does no harm.
const ROUND: Duration = Duration::from_secs(3600);

impl Controller {
    /// Renews the certificates of hosts, without an end.
    pub async fn renew_certificates(self: Arc<Self>, authority: Arc<Authority>) {
        loop {
            self.loops.begin_round(loops::RENEWAL);
            self.renew_certificates_once(&authority).await;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Asks every own host whether it wants a new certificate, and issues one to each that does.
    pub async fn renew_certificates_once(&self, authority: &Arc<Authority>) {
        let nodes = match self.own_nodes().await {
            Ok(nodes) => nodes,
            Err(error) => return tracing::warn!(%error, "cannot read which hosts there are"),
        };
        for (_, node) in nodes {
            let host = node.name();
            match renew(&node, authority).await {
                Ok(false) => {}
                Ok(true) => tracing::info!(host, "the host's certificate was renewed"),
                // The host is asked again, and that it is unreachable is recorded elsewhere.
                Err(error) => {
                    tracing::debug!(host, %error, "cannot renew the certificate of a host");
                }
            }
        }
    }
}

/// Returns whether the host has a new certificate.
async fn renew(node: &Node, authority: &Arc<Authority>) -> Result<bool> {
    let request = RenewalRequest::default();
    let deadline = deadlines::question(node.as_ref());
    let response = node.request_renewal(request, deadline).await?;
    let Some(request) = response.signing_request else {
        return Ok(false);
    };
    let member = Member::Node(node.name().to_owned());
    let authority = Arc::clone(authority);
    let certificate = blocking(move || Ok(authority.sign(&member, &request)?)).await?;
    let request = InstallCertificateRequest { certificate };
    let deadline = deadlines::question(node.as_ref());
    node.install_certificate(request, deadline).await?;
    Ok(true)
}
