//! Where work runs that takes long: beside the tasks that talk to peers, so that it holds none of them up.
//!
//! On a runtime of one thread there is no beside: everything runs there, one thing after the other, in an order that
//! depends on nothing but what the program does. The simulator runs both programs so, under a clock that it moves, and the
//! same seed leads to the same run. This crate decides nothing else.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, RuntimeFlavor};

/// Computes, or touches a disk, in the middle of a task.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    if is_alone() { work() } else { tokio::task::block_in_place(work) }
}

/// The same for work that owns all it needs: the task that waits for it may be dropped meanwhile, and the work goes on.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if is_alone() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
}

/// Starts a worker that may compute and block as long as it likes, and ends when it has nothing to wait for any more.
pub fn start(name: &str, work: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    if is_alone() {
        drop(tokio::spawn(work));
        return Ok(());
    }
    let runtime = Builder::new_current_thread().enable_time().build()?;
    std::thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(work)).map(drop)
}

thread_local! {
    static DISK_TIME: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// How long a disk is to take for whatever is brought to it, by the clock of this thread's runtime: for a simulator.
pub fn set_disk_time(time: Duration) {
    DISK_TIME.set(time);
}

/// Called before something is brought to a disk. A disk takes its time by itself; on one thread nothing else would happen
/// meanwhile, unless the simulator has asked for that.
pub async fn disk_takes_time() {
    let time = DISK_TIME.get();
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

fn is_alone() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::sync::oneshot;

    use super::*;

    async fn where_a_worker_runs() -> Option<String> {
        let (tell, told) = oneshot::channel();
        start("worker", async move { tell.send(thread::current().name().map(str::to_owned)).unwrap() }).unwrap();
        told.await.unwrap()
    }

    #[tokio::test]
    async fn on_one_thread_everything_runs_there() {
        let here = thread::current().name().map(str::to_owned);
        assert_eq!(in_place(|| thread::current().id()), thread::current().id());
        assert_eq!(beside(|| thread::current().id()).await.unwrap(), thread::current().id());
        assert_eq!(where_a_worker_runs().await, here);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn on_several_threads_it_runs_beside() {
        assert_eq!(in_place(|| 7), 7);
        assert_ne!(beside(|| thread::current().id()).await.unwrap(), thread::current().id());
        assert_eq!(where_a_worker_runs().await.as_deref(), Some("worker"));
    }
}
