// The same recipe on Node: fastify, stripe's `constructEvent`, ioredis. AUTO_PIPELINING=1 lets
// ioredis send the commands of one loop turn together.
"use strict";

const fastify = require("fastify");
const Redis = require("ioredis");
const Stripe = require("stripe");

const SECRET = process.env.STRIPE_WEBHOOK_SECRET;
const REMEMBERED_S = 35 * 86400;

const store = new Redis(process.env.REDIS_URL, {
  enableAutoPipelining: process.env.AUTO_PIPELINING === "1",
});
const stripe = new Stripe("sk_test_unused");
const app = fastify({ logger: true, disableRequestLogging: true });

app.addContentTypeParser("application/json", { parseAs: "buffer" }, (request, body, done) =>
  done(null, body),
);

app.post("/webhooks/stripe", async (request, reply) => {
  let event;
  try {
    event = stripe.webhooks.constructEvent(
      request.body,
      request.headers["stripe-signature"],
      SECRET,
    );
  } catch (error) {
    return reply.code(400).send();
  }
  const session = event.data.object;
  let outcome = "duplicate";
  if (await store.set(`seen:${event.id}`, 1, "EX", REMEMBERED_S, "NX")) {
    outcome = "admitted";
    await store.xadd(
      "transitions",
      "*",
      "event_id",
      event.id,
      "type",
      event.type,
      "session_id",
      session.id,
      "status",
      session.status,
      "created",
      event.created,
    );
  }
  request.log.info(
    {
      outcome,
      event_id: event.id,
      event_type: event.type,
      session_id: session.id,
      status: session.status,
    },
    "event.received",
  );
  return { outcome };
});

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.once(signal, async () => {
    await app.close();
    store.disconnect();
  });
}

app.listen({ host: "127.0.0.1", port: Number(process.env.PORT) });
