//! The names of templates, and the one place where templates are looked up for callers.
//!
//! A bare name means a template or a tag of the caller's own tenant, and otherwise one of the
//! administrators. It never means one of a third tenant, whatever that publishes: tenants choose the
//! names of their templates, and one of them could catch what is meant for another. Templates of other
//! tenants are reached as `TENANT/NAME`, and those of the administrators also as `/NAME`.
//!
//! Administrators act in their own place: by a bare name they mean a template of the administrators
//! first, so that no user of the tenant in which their key is can catch what is meant for it.

use std::fmt;

use army_api::templates::{Template, TemplateState, Visibility};
use army_node_api::validate::check_template_name;
use sqlx::any::AnyRow;

use super::{Change, Store, from_word, number, parse, query_failed, readable, text};
use crate::{Error, ErrorKind, Result, random};

/// The owner of the templates of the administrators. No tenant has this name.
pub(crate) const ADMINISTRATORS: &str = "";
/// The tenant of the events of templates that only administrators may see. No tenant has this name.
const FOR_ADMINISTRATORS: &str = "-";
/// The most characters of a template's name that are a part of the name under which hosts store it.
const STORED_STEM: usize = 30;

/// On whose behalf a template is looked up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TemplateCaller<'a> {
    /// The caller's tenant.
    pub(crate) tenant: &'a str,
    /// Whether the caller sees the templates of all tenants.
    pub(crate) is_administrator: bool,
}

impl<'a> TemplateCaller<'a> {
    /// Sees all templates, and belongs to no tenant.
    pub(crate) const ALL: TemplateCaller<'static> = TemplateCaller {
        tenant: ADMINISTRATORS,
        is_administrator: true,
    };

    /// The owner of what the caller makes.
    pub(crate) fn own(&self) -> &'a str {
        match self.is_administrator {
            true => ADMINISTRATORS,
            false => self.tenant,
        }
    }

    /// Whether the caller may change the templates of a tenant.
    fn may_change(&self, owner: &str) -> bool {
        self.is_administrator || owner == self.tenant
    }

    /// Checks that the caller may change a template that they can see.
    ///
    /// # Errors
    /// [`ErrorKind::Forbidden`].
    pub(crate) fn check_may_change(&self, template: &Template) -> Result<()> {
        if self.may_change(template.tenant.as_deref().unwrap_or(ADMINISTRATORS)) {
            return Ok(());
        }
        let name = template.full_name();
        let message = format!("the template `{name}` belongs to others");
        Err(Error::new(ErrorKind::Forbidden, message)
            .advise("only its owner and administrators change it; make one of your own from it"))
    }

    /// The places where a name is looked up, one after the other.
    fn places<'b>(&self, name: &'b str) -> Vec<(&'b str, &'b str)>
    where
        'a: 'b,
    {
        match name.split_once('/') {
            Some(place) => vec![place],
            None if self.is_administrator => vec![(ADMINISTRATORS, name), (self.tenant, name)],
            None => vec![(self.tenant, name), (ADMINISTRATORS, name)],
        }
    }
}

/// The name of a template or of a tag, and the tenant that owns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateName {
    pub(crate) owner: String,
    pub(crate) name: String,
}

impl TemplateName {
    /// The name that a caller has chosen for something new: `NAME`, which belongs to `owner`, or
    /// `TENANT/NAME`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidRequest`], and [`ErrorKind::Forbidden`] where it is another tenant's.
    pub(crate) fn new(text: &str, caller: TemplateCaller<'_>, owner: &str) -> Result<Self> {
        let (owner, name) = text.split_once('/').unwrap_or((owner, text));
        check_template_name(name)?;
        if owner != ADMINISTRATORS && !clone_api::validate::is_valid_name(owner) {
            let message = format!("invalid tenant name `{}`", owner.escape_debug());
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        if !caller.may_change(owner) {
            let message = "only administrators make templates and tags of another tenant";
            return Err(Error::new(ErrorKind::Forbidden, message));
        }
        Ok(Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The name that a caller has chosen for a tag of a template of `owner`: `TAG`, or `TENANT/TAG`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidRequest`].
    pub(crate) fn new_tag(text: &str, owner: &str) -> Result<Self> {
        let (tenant, name) = text.split_once('/').unwrap_or((owner, text));
        if !clone_api::validate::is_valid_name(name) {
            let message = format!("invalid tag name `{}`", name.escape_debug());
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        if tenant != owner {
            let message = "a tag belongs to the tenant of its template";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        Ok(Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The name that is recorded as `text`.
    pub(crate) fn recorded(text: &str) -> Self {
        let (owner, name) = text.split_once('/').unwrap_or((ADMINISTRATORS, text));
        Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
        }
    }

    /// The name with its owner, by which it is looked up at that place alone.
    pub(crate) fn place(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The name of a template.
    pub(crate) fn of(template: &Template) -> Self {
        Self {
            owner: template.tenant.clone().unwrap_or_default(),
            name: template.name.clone(),
        }
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.owner.as_str() {
            ADMINISTRATORS => f.write_str(&self.name),
            owner => write!(f, "{owner}/{}", self.name),
        }
    }
}

/// A template by both of its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateKey {
    /// The name by which callers reach it.
    pub(crate) name: TemplateName,
    /// The name under which hosts store it.
    pub(crate) store_name: String,
}

impl TemplateKey {
    /// A template that is about to be made.
    ///
    /// Hosts know nothing of tenants. Templates of administrators have the same name there, as they
    /// had before templates had owners. Others get a name that no tenant can choose or foresee.
    pub(crate) fn new(name: TemplateName) -> Result<Self> {
        let store_name = match name.owner.as_str() {
            ADMINISTRATORS => name.name.clone(),
            _ => {
                let stem: String = name.name.chars().take(STORED_STEM).collect();
                format!("{stem}-{}", random::hex::<6>()?)
            }
        };
        Ok(Self { name, store_name })
    }

    /// The keys of a template that exists.
    pub(crate) fn of(template: &Template) -> Self {
        Self {
            name: TemplateName::of(template),
            store_name: template.stored_as().to_owned(),
        }
    }

    /// The template of an operation, from its recorded subject and the recorded name on hosts. Former
    /// releases did not record the latter, because it was the same.
    pub(crate) fn recorded(subject: &str, store_name: Option<String>) -> Self {
        let name = TemplateName::recorded(subject);
        let store_name = store_name.unwrap_or_else(|| name.name.clone());
        Self { name, store_name }
    }

    /// The name under which hosts store the template, where it is another one.
    pub(crate) fn other_store_name(&self) -> Option<String> {
        (self.store_name != self.name.name).then(|| self.store_name.clone())
    }

    /// Who can use a template that was just made.
    pub(crate) fn first_visibility(&self) -> Visibility {
        match self.name.owner.as_str() {
            ADMINISTRATORS => Visibility::Public,
            _ => Visibility::Private,
        }
    }
}

/// The query of templates that a caller can see, which ends with a condition or an order: $1 is 1 for
/// an administrator, and $2 the caller's tenant.
macro_rules! visible {
    ($end:literal) => {
        concat!(
            "SELECT * FROM templates WHERE ($1 = 1 OR tenant = $2 OR visibility = 'public' \
             OR (visibility = 'shared' AND EXISTS (SELECT 1 FROM template_shares \
             WHERE template = templates.name AND template_shares.tenant = $2))) ",
            $end
        )
    };
}

impl Store {
    /// The templates that a caller can see, by name.
    pub(crate) async fn templates(&self, caller: TemplateCaller<'_>) -> Result<Vec<Template>> {
        let rows = sqlx::query(visible!("ORDER BY given_name, tenant"))
            .bind(i64::from(caller.is_administrator))
            .bind(caller.tenant)
            .fetch_all(&self.pool)
            .await
            .map_err(query_failed)?;
        let mut templates = Vec::with_capacity(rows.len());
        for template in readable(&rows, "templates", template) {
            templates.push(self.with_hosts(template).await?);
        }
        Ok(templates)
    }

    /// The template that a caller means by `name`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], whether there is none or the caller may not see it.
    pub(crate) async fn find_template(
        &self,
        name: &str,
        caller: TemplateCaller<'_>,
    ) -> Result<Template> {
        let query = visible!("AND tenant = $3 AND given_name = $4");
        match self.first_visible(query, name, caller).await? {
            Some((_, row)) => self.with_hosts(template(&row)?).await,
            None => Err(unknown(name)),
        }
    }

    /// The template that a caller means by `name`, which is its own or that of a tag.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], whether there is none or the caller may not see it.
    pub(crate) async fn find_template_or_tag(
        &self,
        name: &str,
        caller: TemplateCaller<'_>,
    ) -> Result<Template> {
        let query = visible!(
            "AND tenant = $3 AND (given_name = $4 \
             OR name = (SELECT template FROM tags WHERE tags.tenant = $3 AND tag = $4))"
        );
        match self.first_visible(query, name, caller).await? {
            Some((_, row)) => self.with_hosts(template(&row)?).await,
            None => Err(unknown(name)),
        }
    }

    /// The tag that a caller means by `name`, and its template.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], whether there is none or the caller may not see its template.
    pub(crate) async fn find_tag(
        &self,
        name: &str,
        caller: TemplateCaller<'_>,
    ) -> Result<(TemplateName, Template)> {
        let query = visible!(
            "AND tenant = $3 \
             AND name = (SELECT template FROM tags WHERE tags.tenant = $3 AND tag = $4)"
        );
        match self.first_visible(query, name, caller).await? {
            Some((tag, row)) => Ok((tag, template(&row)?)),
            None => {
                let message = format!("tag `{}` not found", name.escape_debug());
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    /// The first row that a query finds for a name at one of its places, which are $3 and $4.
    async fn first_visible(
        &self,
        query: &'static str,
        name: &str,
        caller: TemplateCaller<'_>,
    ) -> Result<Option<(TemplateName, AnyRow)>> {
        for (owner, name) in caller.places(name) {
            let row = sqlx::query(query)
                .bind(i64::from(caller.is_administrator))
                .bind(caller.tenant)
                .bind(owner)
                .bind(name)
                .fetch_optional(&self.pool)
                .await
                .map_err(query_failed)?;
            let found = TemplateName {
                owner: owner.to_owned(),
                name: name.to_owned(),
            };
            if let Some(row) = row {
                return Ok(Some((found, row)));
            }
        }
        Ok(None)
    }
}

impl Change<'_> {
    /// Adds an event about a template, by the name under which hosts store it, for those who can see
    /// it.
    pub(super) async fn template_event(
        &mut self,
        kind: &str,
        store_name: &str,
        detail: &str,
    ) -> Result<()> {
        let row =
            sqlx::query("SELECT tenant, given_name, visibility FROM templates WHERE name = $1")
                .bind(store_name)
                .fetch_optional(self.connection())
                .await
                .map_err(query_failed)?;
        let row = row.ok_or_else(|| unknown(store_name))?;
        let name = TemplateName {
            owner: text(&row, "tenant")?,
            name: text(&row, "given_name")?,
        };
        let is_public = text(&row, "visibility")? == "public";
        let tenant = match name.owner.as_str() {
            // An event of no tenant is for all of them.
            _ if is_public => "",
            ADMINISTRATORS => FOR_ADMINISTRATORS,
            owner => owner,
        };
        self.event(kind, &name.to_string(), tenant, detail).await
    }
}

pub(super) fn unknown(name: &str) -> Error {
    let message = format!("template `{}` not found", name.escape_debug());
    Error::new(ErrorKind::NotFound, message)
}

pub(super) fn template(row: &AnyRow) -> Result<Template> {
    let mut template: Template = parse(&text(row, "facts")?)?;
    template.standbys = number(row, "standbys")?.max(0) as u32;
    template.state = from_word::<TemplateState>(&text(row, "state")?)?;
    template.ready = 0;
    template.vms = 0;
    let (owner, name) = (text(row, "tenant")?, text(row, "given_name")?);
    let store_name = text(row, "name")?;
    template.store_name = (store_name != name).then_some(store_name);
    template.tenant = (owner != ADMINISTRATORS).then_some(owner);
    template.name = name;
    template.visibility = from_word(&text(row, "visibility")?)?;
    template.shared_with = Vec::new();
    Ok(template)
}
