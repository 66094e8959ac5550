//! A value that tasks wait for, and that wakes them in the order in which they came.
//!
//! Tokio's `watch` wakes them in an order of chance: a simulated run would not be repeated by its seed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

#[derive(Default)]
pub struct Watched<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T> Watched<T> {
    pub fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Notify::new() }
    }

    pub fn get(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, value: T) {
        *self.get() = value;
        self.changed.notify_waiters();
    }

    /// Says whether `change` has changed anything, as it does itself.
    pub fn change(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let is_changed = change(&mut self.get());
        if is_changed {
            self.changed.notify_waiters();
        }
        is_changed
    }

    /// What `find` finds, as soon as it finds something.
    pub async fn wait_for<R>(&self, mut find: impl FnMut(&T) -> Option<R>) -> R {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = find(&self.get()) {
                return found;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn whoever_waits_is_woken_in_the_order_of_coming() {
        let watched = Arc::new(Watched::new(false));
        let woken = Arc::new(Mutex::new(Vec::new()));
        let tasks = (0..40).map(|i| {
            let (watched, woken) = (watched.clone(), woken.clone());
            tokio::spawn(async move {
                watched.wait_for(|is_set| is_set.then_some(())).await;
                woken.lock().unwrap().push(i);
            })
        });
        let tasks: Vec<_> = tasks.collect();
        // All of them wait when this task goes on.
        tokio::task::yield_now().await;
        watched.set(true);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*woken.lock().unwrap(), (0..40).collect::<Vec<_>>());
        watched.wait_for(|is_set| is_set.then_some(())).await;
    }
}
