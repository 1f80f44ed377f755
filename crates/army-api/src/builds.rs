//! Templates that are built of others.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Problem;
use crate::exec::OutputStream;
use crate::templates::Template;

/// A request for a template: a clone of another one, after what is done in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildTemplate {
    /// The new template's name.
    pub template: String,
    /// The template that it begins with, or a tag that points to it.
    pub from: String,
    /// What is done, one after the other.
    #[schema(min_items = 1)]
    pub steps: Vec<BuildStep>,
    /// Added to the environment of the commands. The template does not keep it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// It is built on a host that has these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_labels: BTreeMap<String, String>,
    /// The steps may take so many seconds, all together; 3,600 where nothing is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub timeout_s: Option<u64>,
}

/// Something that is done in a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum BuildStep {
    /// A command, which must end with 0. What it leaves running runs in every clone.
    Run {
        /// The program and its arguments. No shell stands between.
        #[schema(min_items = 1)]
        command: Vec<String>,
        /// Where it runs; the user's home where none is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directory: Option<String>,
        /// As whom; root where nobody is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
    },
    /// A file.
    Write {
        /// Its absolute path in the guest.
        path: String,
        /// What is in it.
        text: String,
        /// Its permissions, as in `644`, which they are where none are given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<String>,
    },
}

/// What happens in a build: the `data` of a server-sent event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum BuildEvent {
    /// A step begins.
    Step {
        /// Which, from 1 on.
        number: usize,
    },
    /// Its command wrote something.
    Output {
        /// Where.
        stream: OutputStream,
        /// What. Bytes that are no UTF-8 are replaced.
        text: String,
    },
    /// The template is there. This is the last event.
    Built {
        /// The template.
        template: Template,
    },
    /// There is no template. This is the last event.
    Failed {
        /// Why.
        problem: Problem,
    },
}
