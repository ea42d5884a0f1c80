// The list of models: what /v1/models says, and what was loaded from a checkpoint.

import { get } from "./api";
import { number } from "./dom";
import type { Model } from "./types";

export const models = new Map<string, Model>();
/** Checkpoints that were loaded from the training view: they need not be in the server's list. */
const extra = new Map<string, Model>();
const listeners: (() => void)[] = [];

export function onModels(callback: () => void): void {
  listeners.push(callback);
}

export async function refreshModels(): Promise<void> {
  const { data } = await get<{ data: Model[] }>("/v1/models");
  models.clear();
  for (const model of data) models.set(model.id, model);
  for (const [id, model] of extra) if (!models.has(id)) models.set(id, model);
  for (const listener of listeners) listener();
}

export function addModel(model: Model): void {
  extra.set(model.id, model);
  models.set(model.id, model);
  for (const listener of listeners) listener();
}

export function optionText(model: Model): string {
  return `${model.id}${model.plain ? " (base model)" : ""}${model.loaded ? ", loaded" : ""}`;
}

export function describe(model: Model | undefined): string {
  if (!model) return "";
  const parts = [
    model.parameters === null ? "" : `${number(model.parameters)} parameters`,
    `context ${model.context_length} tokens`,
    model.loaded ? "loaded" : "not loaded: the first answer takes longer",
  ];
  return parts.filter(Boolean).join(", ");
}
