//! Builds: requests to build a template from another one, and their progress.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Problem;
use crate::exec::OutputStream;
use crate::templates::Template;

/// A request to build a template: Army forks an existing template, runs the steps in the clone, and
/// snapshots the result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildTemplate {
    /// The name of the new template. It belongs to the caller's tenant and is private; where an
    /// administrator builds it, it belongs to the administrators and is public. Administrators may
    /// also say `TENANT/NAME`.
    #[schema(max_length = 97)]
    pub template: String,
    /// The base template of the build, or a tag that points to it.
    #[schema(max_length = 97)]
    pub from: String,
    /// The steps of the build, 1 to 1,000. They run one after the other.
    #[schema(min_items = 1, max_items = 1000)]
    pub steps: Vec<BuildStep>,
    /// Environment variables that are added to those of each command. They are not kept in the
    /// template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::environment)]
    pub environment: BTreeMap<String, String>,
    /// Labels that the build host must have. Without any, every host qualifies.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::limits::labels)]
    pub host_labels: BTreeMap<String, String>,
    /// The time limit of all steps together, in seconds, 1 to 2,592,000 (30 days). The default is
    /// 3,600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 2592000)]
    pub timeout_s: Option<u64>,
}

/// One step of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum BuildStep {
    /// Runs a command, which must exit with status 0. Processes that it leaves running also run in
    /// every clone of the template.
    Run {
        /// The program and its arguments, at least one element. The program is executed directly,
        /// without a shell.
        #[schema(min_items = 1)]
        command: Vec<String>,
        /// The working directory of the command. The default is the user's home directory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directory: Option<String>,
        /// The user that runs the command, as a name or a number. The default is root.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
    },
    /// Writes a text file.
    Write {
        /// The absolute path of the file in the guest.
        path: String,
        /// The content of the file.
        text: String,
        /// The permissions of the file, in octal. The default is `644`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<String>,
    },
}

/// The progress of a build: the `data` of a server-sent event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum BuildEvent {
    /// A step has started.
    Step {
        /// The number of the step. The first step is 1.
        number: usize,
    },
    /// The command of the current step has written output.
    Output {
        /// The output stream that the text was written to.
        stream: OutputStream,
        /// The text that was written. Bytes that are not valid UTF-8 are replaced.
        text: String,
    },
    /// The build has succeeded. This is the last event.
    Built {
        /// The new template.
        template: Box<Template>,
    },
    /// The build has failed, and no template was created. This is the last event.
    Failed {
        /// The reason that the build failed.
        problem: Problem,
    },
}
