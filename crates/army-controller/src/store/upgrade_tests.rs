//! Databases of former releases, as later steps find them.

use sqlx::any::AnyPoolOptions;
use sqlx::migrate::Migrator;

use super::template_names::TemplateCaller;
use super::{Store, migrations};
use crate::Database;
use army_api::templates::Visibility;

/// A database after the first `steps` steps, with what `records` inserts.
async fn former(path: &std::path::Path, steps: usize, records: &'static str) -> String {
    sqlx::any::install_default_drivers();
    let url = Database::sqlite_url(path);
    let pool = AnyPoolOptions::new().connect(&url).await.unwrap();
    let first = migrations::all().iter().take(steps).cloned().collect();
    Migrator::with_migrations(first).run(&pool).await.unwrap();
    sqlx::raw_sql(records).execute(&pool).await.unwrap();
    pool.close().await;
    url
}

#[tokio::test]
async fn templates_of_former_releases_become_public_ones_of_the_administrators() {
    let dir = tempfile::tempdir().unwrap();
    let records = "INSERT INTO templates (name, id, host, standbys, facts) VALUES ('t', 'i', 'a', 2, \
         '{\"name\":\"t\",\"id\":\"i\",\"host\":\"a\",\"memory_bytes\":1,\"data_bytes\":1,\
         \"vcpus\":1,\"taken_ms\":1,\"standbys\":0,\"ready\":0,\"vms\":0}'); \
         INSERT INTO template_copies (template, host) VALUES ('t', 'a'); \
         INSERT INTO template_tags (tag, template) VALUES ('latest', 't'); \
         INSERT INTO vms (id, number, name, tenant, template, host, wanted, state, alive, labels, \
         environment, created_ms) VALUES ('1', 1, 'v', 'red', 't', 'a', 1, 'running', 1, '{}', '{}', 1);";
    let url = former(&dir.path().join("army.db"), 12, records).await;
    let store = Store::open(&url).await.unwrap();
    let user = TemplateCaller {
        tenant: "red",
        is_administrator: false,
    };
    for name in ["t", "/t", "latest"] {
        let template = store.find_template_or_tag(name, user).await.unwrap();
        assert_eq!(
            (template.name.as_str(), template.tenant.as_deref()),
            ("t", None)
        );
        assert_eq!(template.visibility, Visibility::Public);
        assert_eq!((template.stored_as(), template.standbys), ("t", 2));
        assert_eq!(
            (template.hosts, template.tags),
            (vec!["a".to_owned()], vec!["latest".to_owned()])
        );
    }
    assert_eq!(store.vm("1").await.unwrap().template, "t");
    assert_eq!(store.vms_by_template().await.unwrap()["t"], 1);
}
