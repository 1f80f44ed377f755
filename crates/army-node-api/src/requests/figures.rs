//! Requests for what a VM uses and what its guest has printed.

use army_api::figures::VmFigures;
use serde::{Deserialize, Serialize};

super::operations! {
    MeasureVmRequest = "measure-vm" -> VmFigures;
    ReadConsoleRequest = "read-console" -> ConsoleOutput;
}

/// See [`NodeApi::measure_vm`](crate::NodeApi::measure_vm).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasureVmRequest {
    /// The VM's id.
    pub vm: String,
}

/// See [`NodeApi::read_console`](crate::NodeApi::read_console).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadConsoleRequest {
    /// The VM's id.
    pub vm: String,
    /// The number of bytes at the end of the output.
    pub bytes: u32,
}

/// The end of what a guest has written to its serial console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleOutput {
    /// The output. What is not UTF-8 in it is replaced. It is the guest's own: it may have control
    /// characters.
    pub text: String,
}
