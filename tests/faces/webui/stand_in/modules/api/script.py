import modules.api.models as OAImodels


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        self.status_code, self.detail = status_code, detail


async def handle_load_model(request_data):
    try:
        OAImodels._load_model(request_data)
        return "OK"
    except Exception as error:
        raise HTTPException(status_code=500, detail="Failed to load the model.") from error


async def handle_load_loras(request_data):
    try:
        OAImodels.load_loras(request_data)
        return "OK"
    except Exception:
        return HTTPException(status_code=400, detail="Failed to apply the LoRA(s).")  # as before v4


routes = {"/v1/internal/model/load": handle_load_model, "/v1/internal/lora/load": handle_load_loras}
