//! The streams of VMs that move: connections to other nodes, and their ends in this process.
//!
//! The launchers and the VMs' processes block, and take descriptors. So each gets one end of a socket,
//! and a task passes on what comes out of it, and what goes in.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use army_node_api::requests::{AcceptVmRequest, SendVmRequest, SentVm};
use army_node_api::{ByteStream, Call, Deadline, Error, Remote, Result, carry};
use clone_host::migrate::Link;
use rustls::ClientConfig;

use super::{NodeService, blocking};

/// How long the destination may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// The longest time without progress, until the launchers set their own.
const PATIENCE: Duration = Duration::from_secs(60);

impl NodeService {
    /// Sends a VM to another host. That goes on where the caller gives up.
    pub(super) async fn send(&self, request: SendVmRequest, call: Call) -> Result<SentVm> {
        let tls = self.cluster()?.tls.clone();
        let node = Arc::clone(&self.node);
        self.admit(call).await?;
        let work = tokio::spawn(async move {
            let begin = (Arc::clone(&node), request.clone());
            work(move || begin.0.begin_departure(&begin.1)).await?;
            let opened = open(&tls, &request).await;
            let link = opened.and_then(connect);
            let sent = match link {
                Ok(link) => {
                    let (node, request) = (Arc::clone(&node), request.clone());
                    work(move || node.depart(&request, link)).await
                }
                Err(error) => {
                    let failure = error.clone();
                    let (node, vm) = (Arc::clone(&node), request.vm.clone());
                    work(move || {
                        node.end_departure(&vm, Some(&failure));
                        Ok(())
                    })
                    .await?;
                    Err(error)
                }
            };
            sent.map_err(|error| {
                let message = format!("the VM was not sent to {}: {}", request.to, error.message);
                Error { message, ..error }
            })
        });
        let remaining = call.deadline.remaining();
        let remaining = remaining.ok_or_else(Error::deadline_exceeded)?;
        match tokio::time::timeout(remaining, work).await {
            Ok(Ok(sent)) => sent,
            Ok(Err(error)) => Err(Error::internal("finish a task", &error)),
            Err(_) => Err(Error::deadline_exceeded()),
        }
    }

    /// Begins to receive a VM from another host.
    pub(super) async fn accept(
        &self,
        request: AcceptVmRequest,
        stream: ByteStream,
        call: Call,
    ) -> Result<()> {
        // Other nodes know no epoch. The controller has said in one that the VM is expected.
        let node = Arc::clone(&self.node);
        let begin = (Arc::clone(&node), request.clone());
        blocking(call.deadline, move || begin.0.begin_arrival(&begin.1)).await?;
        let link = connect(stream);
        tokio::task::spawn_blocking(move || match link {
            Ok(link) => node.receive(&request.vm, link),
            Err(error) => node.refuse_arrival(&request.vm, &error),
        });
        Ok(())
    }
}

/// Runs blocking work to its end.
async fn work<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Error::internal("finish a task", &error)))
}

/// Connects to the destination of a VM.
async fn open(tls: &ClientConfig, request: &SendVmRequest) -> Result<ByteStream> {
    let to = Remote::new(&request.to, request.address, tls.clone())?;
    let call = Call::from(Deadline::after(CONNECT_LIMIT));
    to.open_arrival(&request.vm, &request.ticket, call).await
}

/// The end of a connection for launchers and processes.
fn connect(far: ByteStream) -> Result<Link> {
    let failed = |error: std::io::Error| Error::internal("connect a VM with another host", &error);
    let (near, end) = UnixStream::pair().map_err(failed)?;
    near.set_nonblocking(true).map_err(failed)?;
    let near = tokio::net::UnixStream::from_std(near).map_err(failed)?;
    let output = end.try_clone().map_err(failed)?;
    let link = Link::new(end.into(), output.into(), PATIENCE).map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = carry(far, near).await {
            tracing::debug!(%error, "the connection of a VM that moves has failed");
        }
    });
    Ok(link)
}
