//! The operations of the control socket: one table for the server, the client and the OpenAPI
//! document.

/// An HTTP method that an operation uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Does something.
    Post,
    /// Sets something to a value.
    Put,
}

impl Method {
    /// The method's name in a request.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
        }
    }
}

/// The operations on a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// What it is.
    Info,
    /// What it uses.
    Stats,
    /// Stop its vCPUs and devices.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// End it at once.
    Kill,
    /// What the balloon holds.
    GetBalloon,
    /// Set what the balloon should hold.
    SetBalloon,
    /// Where the console is.
    Console,
    /// Take a snapshot.
    Snapshot,
    /// List the checkpoints.
    Checkpoints,
    /// Take a checkpoint.
    Checkpoint,
    /// Remove a checkpoint.
    RemoveCheckpoint,
    /// Rewind to a checkpoint.
    Rewind,
    /// Give a standby its name, and let it run.
    Adopt,
    /// Tell which pages the guest has touched.
    Touched,
    /// Move it to another host.
    Migrate,
    /// Become a VM that another host sends.
    Receive,
    /// Tell whether it is to run here, and how far its migration is.
    Migration,
    /// Say that it is where it was moved to.
    ConfirmMigration,
    /// Say that it is where it was before.
    CancelMigration,
    /// The document.
    OpenApi,
}

/// The method, path and types of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// The operation.
    pub operation: Operation,
    /// The HTTP method.
    pub method: Method,
    /// The path.
    pub path: &'static str,
    /// The operation's name in the OpenAPI document.
    pub id: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// The type in the request's body, if any.
    pub request: Option<&'static str>,
    /// The type in the answer's body; without one the answer has status 204 and no body.
    pub response: Option<&'static str>,
}

const fn route(
    operation: Operation,
    method: Method,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
) -> Route {
    Route {
        operation,
        method,
        path,
        id,
        summary,
        request: None,
        response: None,
    }
}

impl Route {
    const fn takes(mut self, request: &'static str) -> Self {
        self.request = Some(request);
        self
    }

    const fn gives(mut self, response: &'static str) -> Self {
        self.response = Some(response);
        self
    }
}

/// Every operation, once.
pub const ROUTES: &[Route] = &[
    route(
        Operation::Info,
        Method::Get,
        "/v1/vm",
        "getVm",
        "What the VM is and what it is doing",
    )
    .gives("VmInfo"),
    route(
        Operation::Stats,
        Method::Get,
        "/v1/vm/stats",
        "getStats",
        "What the VM uses: memory, processor time, counters of its devices",
    )
    .gives("VmStats"),
    route(
        Operation::Pause,
        Method::Post,
        "/v1/vm/pause",
        "pause",
        "Stop the vCPUs and devices; a VM that is paused already stays so",
    ),
    route(
        Operation::Resume,
        Method::Post,
        "/v1/vm/resume",
        "resume",
        "Let a paused VM go on; a VM that runs already stays so",
    ),
    route(
        Operation::PowerButton,
        Method::Post,
        "/v1/vm/power-button",
        "pressPowerButton",
        "Press the ACPI power button: asks the guest to shut down, and does not wait for it",
    ),
    route(
        Operation::Kill,
        Method::Post,
        "/v1/vm/kill",
        "kill",
        "End the VM at once, without asking the guest",
    ),
    route(
        Operation::GetBalloon,
        Method::Get,
        "/v1/vm/balloon",
        "getBalloon",
        "What the balloon holds, and the guest's memory statistics",
    )
    .gives("BalloonStatus"),
    route(
        Operation::SetBalloon,
        Method::Put,
        "/v1/vm/balloon",
        "setBalloon",
        "Set what the balloon should hold; the guest follows as it can",
    )
    .takes("BalloonTarget")
    .gives("BalloonStatus"),
    route(
        Operation::Console,
        Method::Get,
        "/v1/vm/console",
        "getConsole",
        "Where the serial console's socket and log are",
    )
    .gives("ConsoleInfo"),
    route(
        Operation::Snapshot,
        Method::Post,
        "/v1/vm/snapshot",
        "snapshot",
        "Take a snapshot into files that come with the request (SCM_RIGHTS); the VM goes on as it was",
    )
    .takes("SnapshotRequest")
    .gives("SnapshotTaken"),
    route(
        Operation::Checkpoints,
        Method::Get,
        "/v1/vm/checkpoints",
        "getCheckpoints",
        "The VM's checkpoints, which exist as long as its process",
    )
    .gives("CheckpointList"),
    route(
        Operation::Checkpoint,
        Method::Post,
        "/v1/vm/checkpoints",
        "takeCheckpoint",
        "Take a checkpoint into files that come with the request (SCM_RIGHTS); the VM goes on as it was",
    )
    .takes("NewCheckpoint")
    .gives("CheckpointTaken"),
    route(
        Operation::RemoveCheckpoint,
        Method::Post,
        "/v1/vm/checkpoints/remove",
        "removeCheckpoint",
        "Remove a checkpoint; others and the VM keep what they share with it",
    )
    .takes("CheckpointRequest")
    .gives("CheckpointList"),
    route(
        Operation::Rewind,
        Method::Post,
        "/v1/vm/rewind",
        "rewind",
        "Set the VM back to a checkpoint, in place: memory, CPUs, devices and disks; files come with the request (SCM_RIGHTS)",
    )
    .takes("CheckpointRequest")
    .gives("Rewound"),
    route(
        Operation::Adopt,
        Method::Post,
        "/v1/vm/adopt",
        "adopt",
        "Give a standby its name, and let it run; only its launcher has use for this",
    )
    .takes("Adoption"),
    route(
        Operation::Touched,
        Method::Get,
        "/v1/vm/touched-pages",
        "getTouchedPages",
        "Which pages of RAM a clone has touched since it was forked: what to bring in ahead for others",
    )
    .gives("TouchedPages"),
    route(
        Operation::Migrate,
        Method::Post,
        "/v1/vm/migrate",
        "migrate",
        "Send the VM to another host over a stream that comes with the request (SCM_RIGHTS); answers \
         when it runs there, or goes on here, and then ends this process, or not",
    )
    .takes("MigrationRequest")
    .gives("MigrationDone"),
    route(
        Operation::Receive,
        Method::Post,
        "/v1/vm/receive",
        "receive",
        "Become the VM that another host sends over a stream that comes with the request \
         (SCM_RIGHTS: what to read from, and what to write to); answers when it runs. Only for a \
         VM that was started for this",
    )
    .gives("MigrationReceived"),
    route(
        Operation::Migration,
        Method::Get,
        "/v1/vm/migration",
        "getMigration",
        "Whether the VM is to run in this process, and how far its migration is",
    )
    .gives("MigrationStatus"),
    route(
        Operation::ConfirmMigration,
        Method::Post,
        "/v1/vm/migration/confirm",
        "confirmMigration",
        "Say that the VM is where it was moved to: it runs if it has arrived here, and ends here if \
         it was given away",
    ),
    route(
        Operation::CancelMigration,
        Method::Post,
        "/v1/vm/migration/cancel",
        "cancelMigration",
        "Say that the VM is where it was before: it runs if it was given away from here, and ends \
         here if it has arrived",
    ),
    route(
        Operation::OpenApi,
        Method::Get,
        "/openapi.json",
        "getOpenApi",
        "This document",
    )
    .gives("OpenApi"),
];

/// The routes on a path; empty if the path does not exist.
pub fn on_path(path: &str) -> impl Iterator<Item = &'static Route> {
    ROUTES.iter().filter(move |route| route.path == path)
}

/// The route of an operation.
pub fn of(operation: Operation) -> &'static Route {
    // The table has every operation: `every_operation_has_one_route` holds that.
    ROUTES
        .iter()
        .find(|route| route.operation == operation)
        .unwrap_or(&ROUTES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_one_route() {
        use Operation::*;
        let all = [
            Info,
            Stats,
            Pause,
            Resume,
            PowerButton,
            Kill,
            GetBalloon,
            SetBalloon,
            Console,
            Snapshot,
            Checkpoints,
            Checkpoint,
            RemoveCheckpoint,
            Rewind,
            Adopt,
            Touched,
            Migrate,
            Receive,
            Migration,
            ConfirmMigration,
            CancelMigration,
            OpenApi,
        ];
        for operation in all {
            // Without a wildcard: a new operation must be added here to compile.
            match operation {
                Info | Stats | Pause | Resume | PowerButton | Kill | GetBalloon | SetBalloon
                | Console | Snapshot | Checkpoints | Checkpoint | RemoveCheckpoint | Rewind
                | Adopt | Touched | Migrate | Receive | Migration | ConfirmMigration
                | CancelMigration | OpenApi => {}
            }
            let count = ROUTES.iter().filter(|r| r.operation == operation).count();
            assert_eq!(count, 1, "{operation:?}");
        }
        assert_eq!(ROUTES.len(), all.len());
    }

    #[test]
    fn no_two_routes_share_method_and_path() {
        for (index, a) in ROUTES.iter().enumerate() {
            for b in &ROUTES[..index] {
                assert!(a.method != b.method || a.path != b.path, "{}", a.path);
                assert_ne!(a.id, b.id);
            }
        }
    }
}
