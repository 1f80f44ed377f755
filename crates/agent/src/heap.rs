//! Keeps the agent small between commands: every clone pays for the pages that its agent touched.

/// Makes all threads share one heap. By default glibc gives many threads many, and pages of each stay
/// behind when the threads are gone. Before there are threads.
pub(crate) fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes no pointers, and there is one thread yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives unused pages back to the kernel.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes no pointers, and any thread may make it.
    unsafe {
        libc::malloc_trim(0);
    }
}
