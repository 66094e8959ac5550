//! An answer's events for who sends them on: they end by the deadline, even where the engine's thread has no core just then.
//!
//! A thread that computes all the time waits its turn beside other such threads; one that sleeps most of the time, as those
//! that serve connections do, is woken soon.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use quant::inference::ask_for_shortest_turns;
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep_until};

use super::engine::{Event, Usage};
use crate::ParticipantError;
use crate::answer::Finish;

pub(super) struct Events {
    received: mpsc::Receiver<Event>,
    due: Option<Pin<Box<Sleep>>>,
    /// Ready once the server ends, and then none.
    closing: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Of the answer so far.
    usage: Usage,
}

/// For an answer to go out; the engine, too, ends before it.
const RESERVE: Duration = Duration::from_millis(1);

impl Events {
    /// When `closing` is ready, the answer ends with what has come.
    pub(super) fn new(
        received: mpsc::Receiver<Event>,
        deadline: Option<Instant>,
        prompt_tokens: usize,
        closing: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let due = deadline.map(|deadline| deadline.checked_sub(RESERVE).unwrap_or(deadline));
        let due = due.map(|due| Box::pin(sleep_until(due.into())));
        let usage = Usage { prompt_tokens, ..Usage::default() };
        Self { received, due, closing: Some(Box::pin(closing)), usage }
    }

    /// A piece of text, or the last.
    pub(super) async fn next(&mut self) -> Event {
        poll_fn(|context| self.poll_next(context)).await
    }

    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        // This thread, too: it is woken before another program's turn is over.
        if self.due.is_some() {
            ask_for_shortest_turns();
        }
        if let Some(closing) = &mut self.closing
            && closing.as_mut().poll(context).is_ready()
        {
            // What has come still goes out; the engine makes no more.
            self.received.close();
            self.closing = None;
        }
        let mut event = self.received.poll_recv(context);
        if let Poll::Ready(Some(Event::Begun { cached_tokens })) = event {
            self.usage.cached_tokens = cached_tokens;
            event = self.received.poll_recv(context);
        }
        match event {
            Poll::Ready(Some(event)) => {
                if let Event::Text { tokens, .. } = event {
                    self.usage.tokens = tokens;
                }
                Poll::Ready(event)
            }
            Poll::Ready(None) if self.closing.is_none() => {
                Poll::Ready(Event::Finished { finish: Finish::Shutdown, usage: self.usage })
            }
            Poll::Ready(None) => Poll::Ready(Event::Failed(ParticipantError::Stopped)),
            Poll::Pending => {
                let Some(due) = &mut self.due else { return Poll::Pending };
                ready!(due.as_mut().poll(context));
                Poll::Ready(Event::Finished { finish: Finish::Deadline, usage: self.usage })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;
    use tokio::time::pause;

    use super::*;

    #[tokio::test]
    async fn an_answer_ends_by_its_deadline_with_what_has_come() {
        pause();
        let (sender, received) = mpsc::channel(4);
        let mut events = Events::new(received, Some(Instant::now() + Duration::from_millis(50)), 7, pending());
        sender.try_send(Event::Begun { cached_tokens: 5 }).unwrap();
        sender.try_send(Event::Text { text: "on".into(), tokens: 3 }).unwrap();
        assert!(matches!(events.next().await, Event::Text { tokens: 3, .. }));
        // The engine says nothing more.
        let last = events.next().await;
        let usage = Usage { prompt_tokens: 7, cached_tokens: 5, tokens: 3 };
        assert!(matches!(last, Event::Finished { finish: Finish::Deadline, usage: found } if found == usage));
        drop(sender);
        assert!(matches!(events.next().await, Event::Failed(ParticipantError::Stopped)));
    }

    #[tokio::test]
    async fn an_answer_ends_with_its_server_with_what_has_come() {
        let (sender, received) = mpsc::channel(4);
        let (closing, closed) = oneshot::channel::<()>();
        let mut events = Events::new(received, None, 7, async { _ = closed.await });
        sender.try_send(Event::Begun { cached_tokens: 5 }).unwrap();
        sender.try_send(Event::Text { text: "on".into(), tokens: 3 }).unwrap();
        drop(closing);
        assert!(matches!(events.next().await, Event::Text { tokens: 3, .. }));
        // The engine would have gone on, and is told not to.
        assert!(sender.is_closed());
        let last = events.next().await;
        let usage = Usage { prompt_tokens: 7, cached_tokens: 5, tokens: 3 };
        assert!(matches!(last, Event::Finished { finish: Finish::Shutdown, usage: found } if found == usage));
    }
}
