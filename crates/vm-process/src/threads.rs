//! Threads for work that takes longer than the event loop may wait.

/// Works in a thread of its own, which has the event loop's filter of system calls. If none can be
/// started, the work's responder is dropped, which sends the client an error.
pub(super) fn work_apart(name: &str, work: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work);
    if let Err(error) = started {
        tracing::error!(%error, "no thread for a {name}");
    }
}
