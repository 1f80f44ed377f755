//! Who acts: the key whose request is carried out, or the system itself. Events have it.
//!
//! The actor accompanies the task that carries out a request. A task that such a task spawns has to
//! be given it with [`Actor::current`] and [`Actor::carry`]; what is not given one is the system.

use std::sync::{Arc, OnceLock};

/// The name of the actor where nobody has requested what happens.
pub const SYSTEM: &str = "system";

tokio::task_local! {
    static CURRENT: Actor;
}

/// Who acts. It can be created before it is known.
#[derive(Debug, Clone, Default)]
pub struct Actor(Arc<OnceLock<String>>);

impl Actor {
    /// The actor of the present task.
    pub fn current() -> Self {
        CURRENT.try_with(Self::clone).unwrap_or_default()
    }

    /// The key with this id.
    pub(crate) fn of(key: &str) -> Self {
        let actor = Self::default();
        actor.identify(key);
        actor
    }

    /// Records the id of the key that acts, once.
    pub fn identify(&self, key: &str) {
        let _ = self.0.set(key.to_owned());
    }

    /// The id of the key, or [`SYSTEM`].
    pub fn name(&self) -> &str {
        self.0.get().map_or(SYSTEM, String::as_str)
    }

    /// Carries out work in the name of this actor.
    pub fn carry<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        CURRENT.scope(self, work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_actor_accompanies_a_task_and_what_is_given_to_another() {
        assert_eq!(Actor::current().name(), SYSTEM);
        let actor = Actor::default();
        let work = async {
            Actor::current().identify("key1");
            let given = Actor::current().carry(async { Actor::current().name().to_owned() });
            let spawned = tokio::spawn(async { Actor::current().name().to_owned() });
            (given.await, spawned.await.unwrap())
        };
        let (given, spawned) = actor.clone().carry(work).await;
        assert_eq!((given.as_str(), spawned.as_str()), ("key1", SYSTEM));
        assert_eq!(actor.name(), "key1");
    }
}
