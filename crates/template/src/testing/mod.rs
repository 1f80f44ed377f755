//! Test support for unit tests and fuzz targets: templates of machines that never ran, and a
//! recorder of the code's accesses to its host.

mod hostile;
mod place;
mod recorder;
mod tamper;

pub use hostile::{Dice, as_format_1, make_hostile};
pub use place::{Place, RAM, device_state};
pub use recorder::{Access, Bounds, record};
pub use tamper::{rewrite, rewrite_text, tamper};

/// The oldest format of a manifest that is read.
pub const FORMAT_1: u32 = crate::migrate::FORMAT_1;
