//! New certificates for nodes whose own get old.

use std::sync::Arc;
use std::time::Duration;

use super::{Controller, Node};
use crate::store::Result;
use army_node_api::blocking;
use army_node_api::cluster::Member;
use army_node_api::cluster::authority::Authority;

/// How often hosts are asked. They ask in return when weeks are left, so that a missed round is
/// none.
const ROUND: Duration = Duration::from_secs(3600);

impl Controller {
    /// Renews hosts' certificates, again and again.
    pub async fn renew(self: Arc<Self>, authority: Arc<Authority>) {
        loop {
            self.renew_once(&authority).await;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// Asks every host whether it wants a new certificate, and gives it to those who do.
    pub async fn renew_once(&self, authority: &Arc<Authority>) {
        for node in self.nodes() {
            let (name, authority) = (node.name().to_owned(), Arc::clone(authority));
            match blocking(move || renew(&node, &authority)).await {
                Ok(false) => {}
                Ok(true) => tracing::info!(host = name, "its certificate is renewed"),
                // That it is silent is told elsewhere, and it is asked again.
                Err(problem) => {
                    tracing::debug!(host = name, %problem, "cannot renew a certificate")
                }
            }
        }
    }
}

/// Returns whether there was anything to do.
fn renew(node: &Node, authority: &Authority) -> Result<bool> {
    let Some(request) = node.certificate_request()? else {
        return Ok(false);
    };
    let member = Member::Node(node.name().to_owned());
    node.take_certificate(&authority.sign(&member, &request)?)?;
    Ok(true)
}
